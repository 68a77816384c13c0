"""Train the embedded teacher's VAE: the encoder is fitted in closed form, the decoder learns by gradient.

    python -m stage1_teacher.tiny.train_vae --out runs/tiny/vae --steps 4000

Stops and goes on: the same command continues from the newest checkpoint. Every draw is keyed by (seed, step).
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.anytext2.checkpoint import load_vae
from common.files import atomic_write
from common.machine import resolve_device
from common.scripts import make_parser, run_script, start_training
from common.seeding import generator
from stage1_teacher.tiny.linear_vae import PatchBasis, fit_patch_basis, set_decoder, set_encoder
from stage1_teacher.tiny.networks import build_vae, network_config
from stage1_teacher.tiny.scene import draw_scene_plan, render_scene

log = logging.getLogger(__name__)

LATENT_NOISE = 0.05
"""Standard deviation added to latents while training: the decoder must bear a denoiser's small errors."""
EDGE_WEIGHT = 0.5


def draw_images(seed: int, count: int, size: int = 96) -> Tensor:
    """Draw scenes, (count, 3, size, size) uint8."""
    images = [render_scene(draw_scene_plan("vae", seed, index, size=size)) for index in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def to_unit(images: Tensor) -> Tensor:
    """Turn uint8 pixels into float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of pixels, and of their differences to the right and downwards (the letters' edges)."""
    error = decoded - images
    across, down = error.diff(dim=3), error.diff(dim=2)
    return error.abs().mean() + EDGE_WEIGHT * (across.abs().mean() + down.abs().mean())


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup)))))


def crops(pool: Tensor, seed: int, step: int, batch_size: int, side: int = 64) -> Tensor:
    """Draw a batch of crops, (batch_size, 3, side, side) in [-1, 1], aligned to the patches."""
    g = generator("vae crops", seed, step)
    index = torch.randint(len(pool), (batch_size,), generator=g)
    corner = torch.randint((pool.shape[2] - side) // 4 + 1, (batch_size, 2), generator=g) * 4
    parts = [
        pool[i, :, y : y + side, x : x + side] for i, (y, x) in zip(index.tolist(), corner.tolist(), strict=True)
    ]
    return to_unit(torch.stack(parts))


def prepare(seed: int, num_fitted: int) -> tuple[Any, PatchBasis]:
    """Build the VAE with its fitted encoder and its decoder's linear start."""
    images = to_unit(draw_images(seed + 1, num_fitted))
    basis = fit_patch_basis(images, 4, 16)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = build_vae()
    set_encoder(vae, basis)
    set_decoder(vae, basis, images[:150])
    return vae, basis


def train(
    out: Path,
    *,
    steps: int,
    batch_size: int,
    peak: float,
    seed: int,
    num_images: int,
    save_every: int = 100,
    num_fitted: int = 400,
    device: torch.device | str = "cpu",
) -> None:
    """Train the decoder; writes `checkpoint.pt` (everything) to `out` every `save_every` steps.

    On a GPU the decoder computes in bfloat16.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(device)
    vae, basis = prepare(seed, num_fitted)
    vae.to(device)
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    ema = [p.detach().clone() for p in decoder]
    optimizer = torch.optim.AdamW(decoder, lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    start = 0
    if (out / "checkpoint.pt").exists():
        saved = torch.load(out / "checkpoint.pt", weights_only=True, map_location="cpu")
        vae.load_state_dict(saved["vae"])
        basis = PatchBasis(**saved["basis"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, start = [part.to(device) for part in saved["ema"]], saved["step"]
        log.info("goes on from step %d", start)
    pool = draw_images(seed, num_images)
    log.info("drew %d images", len(pool))
    began, total = time.monotonic(), 0.0
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        images = crops(pool, seed, step, batch_size)
        latents = basis.latents(images)
        latents = latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator("vae noise", seed, step))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            decoded = vae.decode(latents.to(device)).sample
        loss = reconstruction_loss(decoded.float(), images.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder, 1.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(ema, [p.detach() for p in decoder], 1 - decay)
        total += float(loss.detach())
        if (step + 1) % save_every == 0:
            pace = (time.monotonic() - began) / save_every
            log.info("step %d loss %.4f %.2f s/step", step + 1, total / save_every, pace)
            began, total = time.monotonic(), 0.0
            _save(out, vae, basis, optimizer, ema, step + 1)


def load_trained(folder: Path) -> Any:
    """Return the VAE of a run, with its averaged decoder, or of an exported teacher (models/tiny)."""
    if not (folder / "checkpoint.pt").exists():
        return load_vae(network_config(), folder).autoencoder
    saved = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    vae = build_vae()
    vae.load_state_dict(saved["vae"])
    with torch.no_grad():
        for parameter, mean in zip(
            [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()], saved["ema"], strict=True
        ):
            parameter.copy_(mean)
    return vae


def _save(out: Path, vae: Any, basis: PatchBasis, optimizer: Any, ema: list[Tensor], step: int) -> None:
    state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step}
    with atomic_write(out / "checkpoint.pt") as file:
        torch.save({**state, "basis": asdict(basis)}, file)


def main() -> None:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-images", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads; 0: its default")
    parser.add_argument("--device", default="auto", help="cpu, cuda; auto: cuda if there is one")
    options = parser.parse_args()
    start_training(options.threads)
    train(
        options.out,
        steps=options.steps,
        batch_size=options.batch_size,
        peak=options.learning_rate,
        seed=options.seed,
        num_images=options.num_images,
        device=resolve_device(options.device),
    )


if __name__ == "__main__":
    run_script(main)
