"""Solving the teacher's ODE from noise to image latents with DDIM and guidance, and recording the way."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.anytext2.conditioning import Conditioning, Uncond
from common.anytext2.denoiser import PredictBranches, predict_branches
from common.ddim import Grid, integrate
from common.errors import DataError
from common.schedule import alphas_at, guided, make_alphas_cumprod, predict_x0
from stage1_teacher.teacher.teacher import Teacher


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """B recorded solves. S states were kept at which the network was called, and the end."""

    states: Tensor
    """(B, S + 1, C, h, w), the last one x0; float16 if states were rounded, else float32."""
    timesteps: Tensor
    """Of the kept states but the last, (S,) int64, descending."""
    x0_cond: Tensor | None
    """One-step predictions of the conditional branch at the kept states, (B, S, C, h, w)."""
    x0_uncond: Tensor | None
    """Of the unconditional branch, likewise."""
    all_states: Tensor | None = None
    """The state at every timestep of the grid, and the end, (B, N + 1, C, h, w) float16, if asked for."""


def solve(
    teacher: Teacher,
    conditionings: Sequence[Conditioning],
    uncond: Uncond,
    noise: Tensor,
    grid: Grid,
    *,
    guidance_scale: float,
    keep: Collection[int],
    round_states: bool = True,
    store_predictions: bool = False,
    keep_all: bool = False,
) -> Rollout:
    """Solve B samples of one image size side by side.

    Args:
        teacher: the networks.
        conditionings: B of them; one that occurs more than once (several rollouts of an input) is run through
            WriteNet once.
        uncond: the other branch of guidance; not used if guidance_scale is 1 and no predictions are stored.
        noise: z at the first timestep, (B, C, h, w).
        grid: where the network is called and the solve ends.
        guidance_scale: s in eps_u + s (eps_c - eps_u).
        keep: indices into the grid of the states to record.
        round_states: round kept states to float16 and go on from the rounded value, so that the record is
            what the teacher saw.
        store_predictions: record x0_cond and x0_uncond.
        keep_all: also copy every state on the way; the solve itself is the same to the bit.

    Raises:
        DataError: the teacher produced NaN or Inf.
    """
    both = guidance_scale != 1 or store_predictions
    return record_rollout(
        predict_branches(teacher.denoiser, conditionings, uncond if both else None),
        noise.to(teacher.device, torch.float32),
        grid,
        guidance_scale=guidance_scale,
        keep=keep,
        round_states=round_states,
        store_predictions=store_predictions,
        keep_all=keep_all,
    )


@torch.no_grad()
def record_rollout(
    predict: PredictBranches,
    noise: Tensor,
    grid: Grid,
    *,
    guidance_scale: float,
    keep: Collection[int],
    round_states: bool,
    store_predictions: bool = False,
    keep_all: bool = False,
) -> Rollout:
    """Walk a grid with a given predictor and record the way; see `solve`.

    Source: Ho & Salimans 2022 (guidance), equation 6.
    """
    dtype = torch.float16 if round_states else torch.float32
    recording = _Recording(grid, frozenset(keep), dtype, keep_all=keep_all)

    def predict_guided(z: Tensor, timesteps: Tensor) -> Tensor:
        cond, uncond = predict(z, timesteps)
        if store_predictions and recording.at_kept_state:
            if uncond is None:
                raise ValueError("predictions need the unconditional branch")
            recording.keep_predictions(z, cond, uncond, timesteps)
        return cond if uncond is None else guided(cond, uncond, guidance_scale)

    integrate(predict_guided, noise, grid, recording.on_step)
    return recording.rollout()


class _Recording:
    """What is kept of a solve on its way."""

    def __init__(self, grid: Grid, kept: frozenset[int], dtype: torch.dtype, *, keep_all: bool) -> None:
        self._grid, self._kept, self._dtype, self._keep_all = grid, kept, dtype, keep_all
        self._states: list[Tensor] = []
        self._predictions: list[tuple[Tensor, Tensor]] = []
        self._copies: list[Tensor] = []  # never read back: only kept states are rounded on the way
        self.at_kept_state = False

    def on_step(self, index: int, z: Tensor) -> Tensor:
        """Keep a state; the solve goes on from what was kept of it."""
        ended = index == self._grid.num_steps
        where = "at the end of the solve" if ended else f"in the state at timestep {self._grid.timesteps[index]}"
        self.at_kept_state = index in self._kept
        going_on = z
        if self.at_kept_state or ended:
            self._states.append(z.to(self._dtype))
            _check_finite(self._states[-1], where)
            going_on = self._states[-1].float()
        if self._keep_all:
            self._copies.append(going_on.to(torch.float16, copy=True))
            _check_finite(self._copies[-1], where)
        return going_on

    def keep_predictions(self, z: Tensor, cond: Tensor, uncond: Tensor, timesteps: Tensor) -> None:
        """Keep the one-step x0 of both branches."""
        alphas = alphas_at(make_alphas_cumprod().to(z.device), timesteps)
        both = predict_x0(z, cond, alphas).to(self._dtype), predict_x0(z, uncond, alphas).to(self._dtype)
        _check_finite(torch.cat(both, dim=1), f"in the predictions at timestep {timesteps[0]}")
        self._predictions.append(both)

    def rollout(self) -> Rollout:
        """Put side by side what was kept."""
        cond, uncond = zip(*self._predictions, strict=True) if self._predictions else (None, None)
        return Rollout(
            states=torch.stack(self._states, dim=1),  # (B, S + 1, C, h, w)
            timesteps=self._grid.timesteps[sorted(self._kept)],
            x0_cond=None if cond is None else torch.stack(cond, dim=1),
            x0_uncond=None if uncond is None else torch.stack(uncond, dim=1),
            all_states=torch.stack(self._copies, dim=1) if self._copies else None,  # (B, N + 1, C, h, w)
        )


def _check_finite(values: Tensor, where: str) -> None:
    bad = (~torch.isfinite(values)).flatten(1).any(dim=1)  # (B,)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise DataError(
            f"the teacher produced NaN or Inf {where}, sample {row} of the batch of {len(bad)}; "
            "try model.dtype = float32, and check the checkpoint"
        )
