"""A student that was never trained: its adapter changes nothing, or what chance makes of it."""

from __future__ import annotations

from pathlib import Path

import torch

from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.schedule import trailing_timesteps
from stage2_student.student.adapter import Card, save_adapter
from stage2_student.student.student import add_adapters, load_base


def write_fresh_student(folder: Path, config: Config, steps: int = 2, spread: float = 0.0) -> None:
    """Write a student; `spread` is the standard deviation of what its adapters are filled with."""
    student, checkpoint = load_base(config, torch.float32, "cpu")
    add_adapters(student, config)
    card = Card(
        objective="phased",
        sampler="ddim",
        timesteps=tuple(trailing_timesteps(steps).tolist()),
        step=0,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        base_fingerprint=fingerprint(checkpoint, "base"),
        set_hash="none",
        config={},
    )
    g = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(p.shape, generator=g) * spread if spread else p.detach()
        for name, p in student.trainable().items()
    }
    save_adapter(folder, tensors, card)
