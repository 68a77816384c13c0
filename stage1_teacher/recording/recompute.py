"""Running the teacher again on recorded inputs: do the shards still say what the teacher does?

A record holds exactly what the solver was given (contexts and masked latents are rounded before the solve, and so
is the noise, which is its first state), so no annotation or image is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.ddim import CLEAN, Grid
from common.errors import DataError
from shards.reading.reader import ShardSet
from shards.records.record import Record
from stage1_teacher.teacher.solver import Rollout, solve
from stage1_teacher.teacher.student_states import phase_grids, solve_from
from stage1_teacher.teacher.teacher import Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """How one record compares with a new solve."""

    index: int
    """In the set."""
    input_id: str
    largest: float
    """Largest absolute difference of any recorded value (states, x0_cond, x0_uncond), in units of latents."""


def recompute(config: Config, shards: ShardSet, indices: Sequence[int]) -> Iterator[Recomputed]:
    """Solve recorded inputs again, one at a time, from their own recorded noise.

    Args:
        config: `model` says where the teacher lies; all other settings are the set's own.
        shards: an open set of rollouts, or of a student's states: what is solved again is the teacher's part.
        indices: which records.

    Raises:
        DataError: the teacher is not the one that made the set, or the set holds noised data.
    """
    identity = shards.manifest.identity
    settings: dict[str, Any] = identity.get("config", {}).get("precompute", {})
    source = settings.get("source")
    if source not in ("rollout", "student"):
        raise DataError(f"--recompute needs a set of solves, this one's source is {source!r}")
    ours = fingerprint(config.find_checkpoint(), "teacher")
    if ours != identity.get("teacher_fingerprint"):
        raise DataError(
            f"the configured teacher's fingerprint is {ours[:12]}..., the set was made by "
            f"{str(identity.get('teacher_fingerprint'))[:12]}...; configure the teacher that made it"
        )
    teacher = Teacher.load(config)
    for index in indices:
        record = shards[index]
        if source == "student":
            states = _solve_phases_again(teacher, shards, record, settings)
            pairs: list[tuple[Tensor | None, Tensor | None]] = [(record.rollout_latents, states)]
        else:
            rollout = _solve_again(teacher, shards, record, settings, identity["solver"]["timesteps"])
            pairs = [
                (record.rollout_latents, rollout.states),
                (record.x0_cond, rollout.x0_cond),
                (record.x0_uncond, rollout.x0_uncond),
            ]
        differences = [
            float((stored.double() - again.cpu().double()).abs().max())
            for stored, again in pairs
            if stored is not None and again is not None
        ]
        yield Recomputed(index=index, input_id=record.meta.input_id, largest=max(differences))


def _solve_again(
    teacher: Teacher, shards: ShardSet, record: Record, settings: dict[str, Any], timesteps: list[int]
) -> Rollout:
    return solve(
        teacher,
        [record.conditioning] * record.num_rollouts,
        shards.uncond,
        record.rollout_latents[:, 0],  # (R, C, h, w)
        Grid(timesteps=torch.tensor(timesteps), end=torch.tensor(CLEAN)),
        guidance_scale=record.meta.guidance_scale,
        keep=range(0, len(timesteps), settings["record_every"]),
        store_predictions=record.x0_cond is not None,
    )


def _solve_phases_again(teacher: Teacher, shards: ShardSet, record: Record, settings: dict[str, Any]) -> Tensor:
    """Solve each phase from the student's recorded start, (R, 2 M, C, h, w)."""
    starts = record.rollout_timesteps[::2].tolist()
    return solve_from(
        teacher,
        [record.conditioning] * record.num_rollouts,
        shards.uncond,
        record.rollout_latents[:, ::2],  # (R, M, C, h, w)
        phase_grids(starts, settings["solver_steps"], settings["record_every"]),
        guidance_scale=record.meta.guidance_scale,
    )
