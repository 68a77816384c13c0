"""One picture that compares teacher and student on recorded layouts, from shards alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.anytext2.conditioning import Conditioning, ConditioningBatch
from common.anytext2.denoiser import guide, predict_branches
from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.ddim import integrate, trailing_grid
from common.errors import UsageError
from common.machine import resolve_device
from common.pictures import Picture, grey, in_columns
from shards.reading.reader import ShardSet
from shards.records.record import Record
from stage2_student.student.adapter import find_adapter, read_card
from stage2_student.student.sample import LoadedStudent, decode, load_decoder
from stage2_student.student.shard_facts import read_facts, require_base
from stage2_student.student.student import DTYPES, load_base


def compare(config: Config, shards: ShardSet, adapters: Sequence[Path], indices: Sequence[int]) -> Picture:
    """Show a row per record: layout, the teacher as recorded, and before each student the teacher in its steps.

    All start at the record's noise. The teacher in M steps is what a user would get without distillation: with its
    guidance, and without, which few steps overshoot with and which costs as much as the student.

    Args:
        config: its [model] section.
        shards: a set of recorded rollouts.
        adapters: of the students, each a run's folder, a checkpoint, an adapter's folder, or an export.
        indices: of the records to show.

    Returns:
        The picture; its columns' labels say how many UNet calls an image took.

    Raises:
        UsageError: an index is not in the set, or the records are not rollouts.
        DataError: no adapter there, or it or the set belongs to another base.
    """
    recorded: dict[str, Any] = shards.manifest.identity["config"]["precompute"]
    require_base(read_facts(shards), fingerprint(config.find_checkpoint(), "base"), "the set")
    records = [_read(shards, index) for index in indices]
    found = [find_adapter(adapter) for adapter in adapters]
    cards = [read_card(folder) for folder in found]
    conditionings = [record.conditioning for record in records]
    rollouts = torch.stack([record.rollout_latents[0].float() for record in records])  # (B, S+1, C, h, w)
    base, _ = load_base(config, DTYPES[config.model.dtype], resolve_device(config.model.device))
    guidance = recorded["guidance_scale"]
    branches = 1 if guidance == 1 else 2
    predicts = {"teacher unguided": (guide(predict_branches(base, conditionings, None), 1), 1)}
    if branches == 2:
        guiding = guide(predict_branches(base, conditionings, shards.uncond), guidance)
        predicts = {"teacher": (guiding, 2)} | predicts
    vae = load_decoder(config)
    columns = {
        "layout": [_layout(record) for record in records],
        _label("teacher", recorded["solver_steps"], branches): decode(vae, rollouts[:, -1]),
    }
    alone = Counter(card.num_steps for card in cards)
    for adapter, folder, card in zip(adapters, found, cards, strict=True):
        steps = card.num_steps
        for teacher, (predict, calls) in predicts.items():
            if (undistilled := _label(teacher, steps, calls)) not in columns:
                latents = integrate(predict, rollouts[:, 0].to(base.device), trailing_grid(steps))
                columns[undistilled] = decode(vae, latents)
        name = "student" if alone[steps] == 1 else adapter.resolve().name
        drawn = _sample(LoadedStudent.load(config, folder), conditionings, rollouts[:, :1], indices)
        columns[_label(name, steps, 1)] = decode(vae, drawn)
    return in_columns(columns)


def _sample(
    student: LoadedStudent, conditionings: Sequence[Conditioning], noise: Tensor, indices: Sequence[int]
) -> Tensor:
    """Sample from recorded noise, (B, 1, C, h, w); what an "lcm" student adds later is keyed by the record."""
    if student.card.num_noises > 1:
        later = student.noise(0, indices, tuple(noise.shape[2:]))[:, 1:]
        noise = torch.cat([noise, later], dim=1)
    return student.latents(ConditioningBatch.stack(conditionings), noise)


def _label(name: str, steps: int, calls: int) -> str:
    """Name a column.

    Args:
        name: who sampled.
        steps: of the solve.
        calls: of the UNet in each; guidance takes two.
    """
    plural = {count: "s" * (count > 1) for count in (steps, steps * calls)}
    return f"{name}, {steps} step{plural[steps]}\n{steps * calls} UNet call{plural[steps * calls]}"


def _read(shards: ShardSet, index: int) -> Record:
    if not 0 <= index < len(shards):
        raise UsageError(f"record {index}: the set holds records 0 to {len(shards) - 1}")
    record = shards[index]
    if record.meta.source != "rollout":
        raise UsageError(
            f'record {index} is of source "{record.meta.source}", not a solve; compare on a set of source'
            ' "rollout"'
        )
    return record


def _layout(record: Record) -> Picture:
    """Show glyphs in black on white, the lines' places in grey."""
    glyphs, positions = record.glyphs[0].numpy(), record.positions[0].numpy()  # (H, W)
    shade = np.where(glyphs > 0, 0, np.where(positions > 0, 208, 255)).astype(np.uint8)
    return grey(shade)
