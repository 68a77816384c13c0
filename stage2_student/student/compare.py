"""One picture that compares teacher and student on recorded layouts, from shards alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.errors import UsageError
from common.machine import resolve_device
from common.pictures import Picture, grey, in_columns
from common.schedule import ddim_step, make_alphas_cumprod, trailing_timesteps
from shards.reading.reader import ShardSet
from shards.records.record import Record, Uncond
from stage2_student.student.sample import Sampler, decode, load_decoder
from stage2_student.student.shard_facts import read_facts, require_base
from stage2_student.student.student import DTYPES, Conditioning, Student, load_base
from stage2_student.training.losses import alphas_at, guided


def compare(config: Config, shards: ShardSet, adapter: Path, indices: Sequence[int]) -> Picture:
    """Draw a row per record: layout, the teacher as recorded, the teacher in the student's steps, the student.

    All start at the record's noise. The teacher in M steps is what a user would get without distillation.

    Args:
        config: its [model] section.
        shards: a set of recorded solves.
        adapter: a run's folder, a checkpoint, or an adapter's folder.
        indices: of the records to draw.

    Returns:
        The picture, with labelled columns.

    Raises:
        UsageError: an index is not in the set, or the records are not solves.
        DataError: no adapter there, or it or the set belongs to another base.
    """
    recorded: dict[str, Any] = shards.manifest.identity["config"]["precompute"]
    require_base(
        read_facts(shards),
        fingerprint(config.resolve(config.model.checkpoint, "model.checkpoint"), "base"),
        "the set",
    )
    records = [_read(shards, index) for index in indices]
    sampler = Sampler.load(config, adapter)
    steps = sampler.card.num_steps
    conditioning = Conditioning.stack(records)
    solves = torch.stack([record.rollout_latents[0].float() for record in records])  # (B, S+1, C, h, w)
    noise = solves[:, :1]
    if sampler.noises_needed > 1:
        shape = tuple(solves.shape[2:])
        later = sampler.noise(0, indices, shape)[:, 1:]
        noise = torch.cat([noise, later], dim=1)
    base, _ = load_base(config, DTYPES[config.model.dtype], resolve_device(config.model.device))
    scale = recorded["guidance_scale"]
    undistilled = solve_guided(base, conditioning, shards.uncond, noise[:, 0], steps=steps, guidance_scale=scale)
    vae = load_decoder(config)
    columns = {
        "layout": [_layout(record) for record in records],
        f"teacher, {recorded['solver_steps']} steps": decode(vae, solves[:, -1]),
        f"teacher, {steps} steps": decode(vae, undistilled),
        f"student, {steps} steps": decode(vae, sampler.latents(conditioning, noise)),
    }
    return in_columns(columns)


@torch.no_grad()
def solve_guided(
    base: Student,
    conditioning: Conditioning,
    uncond: Uncond,
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
) -> Tensor:
    """Sample the undistilled network with guidance from what shards hold, on the trailing grid.

    Args:
        base: without adapters.
        conditioning: of B images.
        uncond: the set's unconditional contexts.
        noise: (B, C, h, w).
        steps: DDIM steps.
        guidance_scale: s in eps_u + s (eps_c - eps_u).

    Returns:
        Latents, (B, C, h, w) float32.
    """
    device = next(base.parameters()).device
    count = len(conditioning)
    without = Conditioning(
        image_context=uncond.image_context.expand(count, -1, -1),
        context_mask=None,
        text_context=uncond.text_context.expand(count, -1, -1),
        hints=conditioning.hints,
    )
    branches = [branch.to(device, base.dtype) for branch in (conditioning, without)]
    controls = [base.control(branch) for branch in branches]
    table, z = make_alphas_cumprod().to(device), noise.to(device, torch.float32)
    grid = [*trailing_timesteps(steps).tolist(), -1]
    for t, t_end in pairwise(grid):
        now, later = (torch.full((count,), when, device=device) for when in (t, t_end))
        cond, rest = (base(z, now, *pair).float() for pair in zip(branches, controls, strict=True))
        z = ddim_step(z, guided(cond, rest, guidance_scale), alphas_at(table, now), alphas_at(table, later))
    return z


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
