"""AnyText2's own sampling, written from its formulas; and a merged student sampled by it, from its file alone.

    python pipeline.py export --config configs/tiny.toml --adapter RUN --format merged --out merged.safetensors
    python -m tests.upstream_program --config configs/tiny.toml --shards SET --merged merged.safetensors

The student must be one of train.grid = "upstream". Printed is how far its latents are from the recorded solves of
a set's first records, root mean square, from the same noise: by our sampler; by that program's arithmetic in
float32; and with alphas_cumprod rounded to float16, as that program has them in half precision.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.anytext2.checkpoint import load_denoiser
from common.anytext2.conditioning import ConditioningBatch
from common.config import load_config
from common.scripts import run_script
from shards.reading.reader import ShardSet
from stage2_student.student.sample import LoadedStudent


def upstream_alphas_cumprod() -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def upstream_ddim(
    predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int, alphas_cumprod: Tensor
) -> Tensor:
    """AnyText2's DDIM at eta 0, one call a step at scale 1.

    It lists t = 1, 1 + c, 1 + 2c ... for c = 1000 // steps and calls from the last; the step from the first t ends
    at alphas_cumprod[0].
    """
    table = alphas_cumprod.numpy()
    timesteps = np.arange(0, 1000, 1000 // steps) + 1
    alphas = table[timesteps]
    before = np.concatenate([table[:1], alphas[:-1]])
    z = noise
    for index in reversed(range(len(timesteps))):
        eps = predict(z, torch.full((len(z),), int(timesteps[index])))
        a, a_before = (torch.full((len(z), 1, 1, 1), float(of[index])) for of in (alphas, before))
        x0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
        z = a_before.sqrt() * x0 + (1 - a_before).sqrt() * eps
    return z


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.upstream_program", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--merged", type=Path, required=True)
    parser.add_argument("--records", type=int, default=24)
    parsed = parser.parse_args()
    config = load_config(parsed.config, ["model.device=cpu", "model.dtype=float32"])
    shards = ShardSet.open(parsed.shards, allow_incomplete=True)
    records = [shards[index] for index in range(min(parsed.records, len(shards)))]
    conditioning = ConditioningBatch.stack([record.conditioning for record in records]).to("cpu", torch.float32)
    solves = torch.stack([record.rollout_latents[0].float() for record in records])  # (B, S + 1, C, h, w)
    noise, x0, table = solves[:, 0], solves[:, -1], upstream_alphas_cumprod()
    sampler = LoadedStudent.load(config, parsed.merged)
    denoiser = load_denoiser(config.load_network(), parsed.merged)
    control = denoiser.control(conditioning)

    @torch.no_grad()
    def predict(z: Tensor, t: Tensor) -> Tensor:
        return denoiser(z, t, conditioning, control)

    steps = sampler.card.num_steps
    ours = sampler.latents(conditioning, noise[:, None])
    theirs = upstream_ddim(predict, noise, steps, table)
    rounded = upstream_ddim(predict, noise, steps, table.half().float())
    print(f"{len(records)} records, {steps} steps at t = {list(sampler.card.timesteps)}")
    for name, latents in (("ours", ours), ("theirs, float32", theirs), ("theirs, rounded table", rounded)):
        error, apart = (float((latents - of).square().mean().sqrt()) for of in (x0, ours))
        print(f"{name:22s} error {error:.4f}  apart from ours {apart:.1e}")


if __name__ == "__main__":
    run_script(main)
