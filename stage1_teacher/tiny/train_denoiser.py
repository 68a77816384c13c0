r"""Train the embedded teacher's UNet, WriteNet, text tower and glyph embedding together, from scratch.

    python -m stage1_teacher.tiny.train_denoiser --features runs/tiny/features --vae runs/tiny/vae \
        --position runs/tiny/position.pt --out runs/tiny/denoiser --steps 6000

Stops and goes on: the same command continues from the newest checkpoint. Each image is seen under several noises
a step: WriteNet and the text tower run once an image, as at sampling.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import atomic_write
from common.schedule import make_alphas_cumprod
from stage1_teacher.glyph_embedding import PositionEncoder
from stage1_teacher.text_encoder import encode_tokens, encode_with_lines
from stage1_teacher.tiny.batches import FeatureStore, TrainingBatch
from stage1_teacher.tiny.features import FeatureMaker
from stage1_teacher.tiny.networks import Denoiser, build_denoiser, network_config
from stage1_teacher.tiny.train_vae import learning_rate

log = logging.getLogger(__name__)

MAX_SNR = 5.0
"""Above it a noise level's weight falls (min-SNR, Hang et al. 2023, arXiv 2303.09556)."""
MAX_WEIGHT = 200.0
"""Of an eps error. (SNR + 1) / SNR would count errors of v alike; with the plain eps loss a network learns late
what the picture is, for at high noise that hardly shows in eps."""
EMA_DECAY, EMA_EVERY = 0.95, 5
CROP = 64
"""Pixels; whole images have 96."""
PATCH, PATCH_TIMESTEP = 32, 500
"""Side of a patch, pixels, and the lowest timestep at which it is seen."""
LOG_EVERY = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of a run."""

    steps: int
    images: int
    """Per step."""
    noises: int
    """Per image."""
    peak: float
    """Learning rate after warm-up; a cosine follows."""
    seed: int
    patches: int = 0
    """Small crops of as many other images at high noise, added to each step. They cost a ninth each, and what the
    captions say shows in them as well as in a whole image: a batch of twelve is too noisy to learn it from."""
    save_every: int = 100
    """Steps."""
    crop_steps: int
    """First steps, on crops: they teach how letters look under their glyphs at less than half the cost."""


def denoising_losses(denoiser: Denoiser, batch: TrainingBatch, cumulative: Tensor, placeholder: int) -> Tensor:
    """Return the weighted squared error of each noise prediction, (B K,).

    Args:
        denoiser: the networks.
        batch: B images with K noises each.
        cumulative: alphas_cumprod, (1000,).
        placeholder: token id that stands for a line.
    """
    noises = len(batch.timesteps) // len(batch.latents)
    lines = denoiser.embedding.combine(batch.glyph_features, batch.where, batch.font_features, batch.colors)
    text_context = encode_with_lines(denoiser.clip, batch.text_tokens, lines.split(batch.lines), placeholder)
    image_context = encode_tokens(denoiser.clip, batch.image_tokens)  # (B, 77, c)
    control = denoiser.writenet(batch.hints, text_context)
    repeated = tuple(part.repeat_interleave(noises, dim=0) for part in control)
    level = cumulative[batch.timesteps][:, None, None, None]
    noisy = level.sqrt() * batch.latents.repeat_interleave(noises, dim=0) + (1 - level).sqrt() * batch.noise
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    eps = denoiser.unet(noisy, batch.timesteps, image_context.repeat_interleave(noises, dim=0), repeated)
    error = (eps - batch.noise).square() * batch.weight.repeat_interleave(noises, dim=0)
    snr = level[:, 0, 0, 0] / (1 - level[:, 0, 0, 0])
    return error.mean(dim=(1, 2, 3)) * noise_weight(snr)


def noise_weight(snr: Tensor) -> Tensor:
    """Weigh squared eps errors by their signal-to-noise ratio alpha^2 / sigma^2."""
    return ((snr + 1) / snr).clamp(max=MAX_WEIGHT) * (MAX_SNR / snr).clamp(max=1)


class Trainer:
    """Networks, averages and optimizer of a run."""

    def __init__(self, out: Path, settings: Settings, position: Path) -> None:
        """Start from scratch, or from the run's checkpoint."""
        self.out, self.settings, self.step = out, settings, 0
        self.config = network_config()
        self.denoiser = build_denoiser(self.config, settings.seed)
        self.denoiser.embedding.position_encoder.load_state_dict(torch.load(position, weights_only=True))
        for module in (self.denoiser.unet, self.denoiser.writenet):
            module.to(memory_format=torch.channels_last)
        self.parameters = self.denoiser.named_parameters()
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        if (out / "checkpoint.pt").exists():
            saved = torch.load(out / "checkpoint.pt", weights_only=True)
            self.step, self.ema = saved["step"], saved["ema"]
            for name, value in saved["weights"].items():
                self.parameters[name].data.copy_(value)
            self.optimizer.load_state_dict(saved["optimizer"])
            log.info("goes on from step %d", self.step)

    def train_step(self, batch: TrainingBatch, cumulative: Tensor, patches: TrainingBatch | None = None) -> Tensor:
        """Take one optimizer step; returns each prediction's loss, (B K,), without those of the patches."""
        rate = learning_rate(self.step, self.settings.steps, self.settings.peak, warmup=100)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = denoising_losses(self.denoiser, batch, cumulative, self.config.placeholder_token_id)
        self.optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        if patches is not None:
            more = denoising_losses(self.denoiser, patches, cumulative, self.config.placeholder_token_id)
            more.mean().backward()
        trained = list(self.parameters.values())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.step += 1
        if self.step % EMA_EVERY == 0:
            done = self.step // EMA_EVERY
            decay = min(EMA_DECAY, (1 + done) / (10 + done))
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in trained], 1 - decay)
        return losses.detach()

    def save(self) -> None:
        """Write the checkpoint."""
        state: dict[str, Any] = {
            "step": self.step,
            "ema": self.ema,
            "weights": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_write(self.out / "checkpoint.pt") as file:
            torch.save(state, file)


def train(out: Path, settings: Settings, *, features: Path, vae: Path, position: Path) -> None:
    """Train until `settings.steps`."""
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(out, settings, position)
    encoder: PositionEncoder = trainer.denoiser.embedding.position_encoder
    store = FeatureStore(features, encoder, trainer.config)
    log.info("%d layouts", store.refresh())
    blank = FeatureMaker(vae).latents(torch.full((1, 3, 96, 96), -1.0))[0]
    cumulative = make_alphas_cumprod()
    began, parts = time.monotonic(), list[Tensor]()
    while trainer.step < settings.steps:
        batch = store.batch(
            settings.seed,
            trainer.step,
            images=settings.images,
            noises=settings.noises,
            blank_latents=blank,
            side=CROP if trainer.step < settings.crop_steps else None,
        )
        patches = None
        if settings.patches:
            patches = store.batch(
                settings.seed,
                trainer.step,
                images=settings.patches,
                noises=1,
                blank_latents=blank,
                side=PATCH,
                lowest=PATCH_TIMESTEP,
            )
        losses = trainer.train_step(batch, cumulative, patches)
        # By noise level: mean of the first, second ... quarter of the timesteps.
        parts.append(losses[batch.timesteps.argsort()].reshape(4, -1).mean(1))
        if trainer.step % LOG_EVERY == 0:
            quarters = torch.stack(parts).mean(0)
            levels = " ".join(f"{value:.4f}" for value in quarters)
            pace = (time.monotonic() - began) / LOG_EVERY
            log.info("step %d loss %.4f (%s) %.2f s/step", trainer.step, quarters.mean(), levels, pace)
            began, parts = time.monotonic(), []
        if trainer.step % settings.save_every == 0 or trainer.step == settings.steps:
            trainer.save()
            log.info("saved; %d layouts", store.refresh())


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("features", "vae", "position", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--crop-steps", type=int, default=1500, help="first steps, on crops of 64 px")
    parser.add_argument("--images", type=int, default=6, help="images of a step")
    parser.add_argument("--patches", type=int, default=40, help="small crops added to a step")
    parser.add_argument("--noises", type=int, default=2, help="noises an image")
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        steps=options.steps,
        images=options.images,
        noises=options.noises,
        peak=options.learning_rate,
        seed=options.seed,
        crop_steps=options.crop_steps,
        patches=options.patches,
    )
    train(options.out, settings, features=options.features, vae=options.vae, position=options.position)


if __name__ == "__main__":
    main()
