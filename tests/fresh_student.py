"""A student that was never trained: its adapter changes nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.schedule import trailing_timesteps
from stage2_student.student.adapter import Card, save_adapter
from stage2_student.student.student import add_adapters, load_base


def write_fresh_student(folder: Path, config: Config, steps: int = 2) -> None:
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
    save_adapter(folder, {name: p.detach() for name, p in student.trainable().items()}, card)
