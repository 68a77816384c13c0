"""Solves from a student's own states: where the teacher would have gone from where the student has come.

A student that is trained on the teacher's states alone never sees what its own earlier steps leave behind. The
student itself is handed in: this package knows none.

Source: Ross et al. 2011 (DAgger, arXiv 1011.0686): the expert is asked at the states that the learner visits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from common.anytext2.conditioning import Conditioning, Uncond
from common.anytext2.denoiser import predict_branches
from common.ddim import CLEAN, Grid
from common.errors import DataError, UsageError
from common.grids import trailing_steps
from stage1_teacher.teacher.solver import record_rollout
from stage1_teacher.teacher.teacher import Teacher

MIN_STEPS = 2
"""Solver steps of a phase, at least: see `phases.require_distance` of stage two."""
Walk = Callable[[Sequence[Conditioning], Tensor], Tensor]
"""B conditionings and their noise (B, C, h, w) to the states at which the student is called, the noise being the
first, (B, M, C, h, w) float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentStates:
    """A student whose states are recorded."""

    timesteps: tuple[int, ...]
    """Where it is called, falling: its phases' starts, M of them."""
    description: Mapping[str, Any]
    """What it is, as JSON values: a part of the set's identity."""
    load: Callable[[], Walk]
    """Loads its networks."""

    @property
    def recorded_timesteps(self) -> list[int]:
        """The t of all states of a record but the last: each phase's start and end in turn, 2 M - 1 of them."""
        first, *later = self.timesteps
        return [first, *(t for start in later for t in (start, start))]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PhaseGrid:
    """The teacher's grid over a phase."""

    grid: Grid
    rounded: frozenset[int]
    """Steps at which the state is rounded to float16 and gone on from, as where a whole solve is recorded."""


def phase_grids(timesteps: Sequence[int], solver_steps: int, record_every: int) -> list[PhaseGrid]:
    """Cut the teacher's grid where a student's phases start, M parts.

    Args:
        timesteps: of the student, falling.
        solver_steps: N, of the whole trailing grid.
        record_every: steps between the states that a whole solve would keep.

    Raises:
        UsageError: the student is called off the grid, or a phase has fewer than `MIN_STEPS` solver steps.
        UsageError: it takes one step: it has no state but the noise.
    """
    if len(timesteps) == 1:
        raise UsageError(
            "--states-from: received a student of one step, expected two or more: its only state is the noise;"
            " record fresh solves instead, with another precompute.seed"
        )
    grid = trailing_steps(solver_steps).tolist()
    stops = [*grid, CLEAN]
    places = [grid.index(t) for t in timesteps if t in grid]
    ends = [*places, solver_steps]
    too_short = any(end - start < MIN_STEPS for start, end in pairwise(ends))
    if len(places) < len(timesteps) or timesteps[0] != grid[0] or too_short:
        raise UsageError(
            f"--states-from: the student is called at t = {', '.join(map(str, timesteps))}, expected starts of"
            f" phases of {MIN_STEPS} or more of the teacher's {solver_steps} solver steps; set"
            f" precompute.solver_steps to a multiple of {len(timesteps)}, {MIN_STEPS * len(timesteps)} or more"
        )
    return [
        PhaseGrid(
            grid=Grid(timesteps=torch.tensor(grid[start:end]), end=torch.tensor(stops[end])),
            rounded=frozenset({0, *(step - start for step in range(start, end) if step % record_every == 0)}),
        )
        for start, end in pairwise(ends)
    ]


def solve_from(
    teacher: Teacher,
    conditionings: Sequence[Conditioning],
    uncond: Uncond,
    starts: Tensor,
    grids: Sequence[PhaseGrid],
    *,
    guidance_scale: float,
) -> Tensor:
    """Solve each phase of B samples from its own start; WriteNet runs once for all phases.

    Args:
        teacher: the networks.
        conditionings: B of them, see `solve`.
        uncond: the other branch of guidance; not used if guidance_scale is 1.
        starts: a state at each phase's start, (B, M, C, h, w); rounded to float16 before it is solved from.
        grids: of the phases, see `phase_grids`.
        guidance_scale: s in eps_u + s (eps_c - eps_u).

    Returns:
        (B, 2 M, C, h, w) float16: each phase's start and the teacher's state at its end, in turn.

    Raises:
        DataError: the student, or the teacher, produced NaN or Inf.
    """
    if not bool(torch.isfinite(starts.half()).all()):
        raise DataError(
            "the student of --states-from came to NaN or Inf, or beyond float16; look at what it draws, and give"
            " another checkpoint"
        )
    predict = predict_branches(teacher.denoiser, conditionings, uncond if guidance_scale != 1 else None)
    starts = starts.to(teacher.device, torch.float32)
    found = []
    for start, phase in zip(starts.unbind(1), grids, strict=True):
        states = record_rollout(
            predict, start, phase.grid, guidance_scale=guidance_scale, keep=phase.rounded, round_states=True
        ).states
        found += [states[:, 0], states[:, -1]]
    return torch.stack(found, dim=1)
