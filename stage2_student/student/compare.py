"""One picture that compares teacher and student on recorded layouts, from shards alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.anytext2.conditioning import ConditioningBatch
from common.anytext2.denoiser import guide, predict_branches
from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.ddim import integrate, trailing_grid
from common.errors import UsageError
from common.machine import resolve_device
from common.pictures import Picture, grey, in_columns
from shards.reading.reader import ShardSet
from shards.records.record import Record
from stage2_student.student.sample import LoadedStudent, decode, load_decoder
from stage2_student.student.shard_facts import read_facts, require_base
from stage2_student.student.student import DTYPES, load_base


def compare(config: Config, shards: ShardSet, adapter: Path, indices: Sequence[int]) -> Picture:
    """Show a row per record: layout, the teacher as recorded, the teacher in the student's steps, the student.

    All start at the record's noise. The teacher in M steps is what a user would get without distillation.

    Args:
        config: its [model] section.
        shards: a set of recorded rollouts.
        adapter: a run's folder, a checkpoint, or an adapter's folder.
        indices: of the records to show.

    Returns:
        The picture, with labelled columns.

    Raises:
        UsageError: an index is not in the set, or the records are not rollouts.
        DataError: no adapter there, or it or the set belongs to another base.
    """
    recorded: dict[str, Any] = shards.manifest.identity["config"]["precompute"]
    require_base(read_facts(shards), fingerprint(config.find_checkpoint(), "base"), "the set")
    records = [_read(shards, index) for index in indices]
    sampler = LoadedStudent.load(config, adapter)
    steps = sampler.card.num_steps
    conditionings = [record.conditioning for record in records]
    rollouts = torch.stack([record.rollout_latents[0].float() for record in records])  # (B, S+1, C, h, w)
    noise = rollouts[:, :1]
    if sampler.card.num_noises > 1:
        later = sampler.noise(0, indices, tuple(rollouts.shape[2:]))[:, 1:]
        noise = torch.cat([noise, later], dim=1)
    base, _ = load_base(config, DTYPES[config.model.dtype], resolve_device(config.model.device))
    predict = guide(predict_branches(base, conditionings, shards.uncond), recorded["guidance_scale"])
    undistilled = integrate(predict, rollouts[:, 0].to(base.device), trailing_grid(steps))
    vae = load_decoder(config)
    columns = {
        "layout": [_layout(record) for record in records],
        f"teacher, {recorded['solver_steps']} steps": decode(vae, rollouts[:, -1]),
        f"teacher, {steps} steps": decode(vae, undistilled),
        f"student, {steps} steps": decode(vae, sampler.latents(ConditioningBatch.stack(conditionings), noise)),
    }
    return in_columns(columns)


def _read(shards: ShardSet, index: int) -> Record:
    if not 0 <= index < len(shards):
        raise UsageError(f"record {index}: the set holds records 0 to {len(shards) - 1}")
    record = shards[index]
    if record.meta.source != "rollout":
        raise UsageError(f"record {index} holds noised data, not a solve; compare on a set of source rollout")
    return record


def _layout(record: Record) -> Picture:
    """Show glyphs in black on white, the lines' places in grey."""
    glyphs, positions = record.glyphs[0].numpy(), record.positions[0].numpy()  # (H, W)
    shade = np.where(glyphs > 0, 0, np.where(positions > 0, 208, 255)).astype(np.uint8)
    return grey(shade)
