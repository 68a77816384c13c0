"""Solving the teacher's ODE from noise to image latents with DDIM and guidance, and recording the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.anytext2.hints import Hints
from common.anytext2.unet import Control, pad_contexts
from common.errors import DataError
from common.schedule import ddim_step, make_alphas_cumprod, predict_x0
from stage1_teacher.teacher.teacher import Conditioning, Teacher, Uncond, stack_hints

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(z_t (B, C, h, w), t (B,) int64) to the noise of both branches; None if there is no unconditional one."""


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


@torch.no_grad()
def solve(
    teacher: Teacher,
    conditionings: Sequence[Conditioning],
    uncond: Uncond,
    noise: Tensor,
    timesteps: Tensor,
    *,
    guidance_scale: float,
    keep: Sequence[int],
    alphas_cumprod_end: float = 1.0,
    round_states: bool = True,
    store_predictions: bool = False,
    keep_all: bool = False,
    attnx_scale: float = 1.0,
) -> Rollout:
    """Solve B samples of one image size side by side.

    Args:
        teacher: the networks.
        conditionings: B of them; one that occurs more than once (several rollouts of an input) is run through
            WriteNet once.
        uncond: the other branch of guidance; not used if guidance_scale is 1 and no predictions are stored.
        noise: z at the first timestep, (B, C, h, w).
        timesteps: the grid, (N,) int64, descending.
        guidance_scale: s in eps_u + s (eps_c - eps_u).
        keep: indices into the grid of the states to record, ascending.
        alphas_cumprod_end: where the grid ends: 1 for the trailing grid, alphas_cumprod[0] for upstream's.
        round_states: round kept states to float16 and go on from the rounded value, so that the record is
            what the teacher saw.
        store_predictions: record x0_cond and x0_uncond.
        keep_all: also copy every state on the way; the solve itself is the same to the bit.
        attnx_scale: weight of AttnX.

    Raises:
        DataError: the teacher produced NaN or Inf.
    """
    guided = guidance_scale != 1 or store_predictions
    predict = make_predict(teacher, conditionings, uncond if guided else None, attnx_scale)
    return integrate(
        predict,
        noise.to(teacher.device, torch.float32),
        timesteps,
        guidance_scale=guidance_scale,
        keep=keep,
        alphas_cumprod_end=alphas_cumprod_end,
        round_states=round_states,
        store_predictions=store_predictions,
        keep_all=keep_all,
    )


def make_predict(
    teacher: Teacher, conditionings: Sequence[Conditioning], uncond: Uncond | None, attnx_scale: float = 1.0
) -> Predict:
    """Prepare what stays the same over a solve: WriteNet's residuals and the padded contexts of both branches."""
    count = len(conditionings)
    contexts = [item.image_context for item in conditionings]
    if uncond is not None:
        contexts += [uncond.image_context] * count
    context, mask = pad_contexts([context.to(teacher.dtype) for context in contexts])  # (B or 2 B, 77 k, c)
    control = _control_of_both(teacher, conditionings, uncond)

    def predict(noisy_latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
        if uncond is not None:
            noisy_latents, timesteps = torch.cat([noisy_latents] * 2), torch.cat([timesteps] * 2)
        eps = teacher.eps(noisy_latents, timesteps, context, control, context_mask=mask, attnx_scale=attnx_scale)
        return (eps, None) if uncond is None else (eps[:count], eps[count:])

    return predict


def _control_of_both(teacher: Teacher, conditionings: Sequence[Conditioning], uncond: Uncond | None) -> Control:
    """Run WriteNet once per different conditioning and branch; rows are [conditional, unconditional]."""
    different = list({id(item): item for item in conditionings}.values())
    row_of = {id(item): row for row, item in enumerate(different)}
    rows = [row_of[id(item)] for item in conditionings]
    hints: Hints = stack_hints(different)
    text = torch.stack([item.text_context for item in different])  # (D, 77, c)
    if uncond is not None:
        rows += [len(different) + row for row in rows]
        hints = Hints(
            glyphs=torch.cat([hints.glyphs] * 2),
            positions=torch.cat([hints.positions] * 2),
            masked_latents=torch.cat([hints.masked_latents] * 2),
        )
        text = torch.cat([text, uncond.text_context.expand_as(text)])  # (2 D, 77, c)
    control = teacher.control(hints, text)
    if rows == list(range(len(text))):
        return control
    index = torch.tensor(rows, device=teacher.device)
    return tuple(residual[index] for residual in control)


def integrate(
    predict: Predict,
    noise: Tensor,
    timesteps: Tensor,
    *,
    guidance_scale: float,
    keep: Sequence[int],
    alphas_cumprod_end: float,
    round_states: bool,
    store_predictions: bool = False,
    keep_all: bool = False,
) -> Rollout:
    """Run DDIM over a grid with a given predictor; see `solve`.

    Source: Song et al. 2021 (DDIM), equation 12; Ho & Salimans 2022 (guidance), equation 6.
    """
    grid = [int(t) for t in timesteps]
    alphas = [*make_alphas_cumprod()[timesteps.cpu()].tolist(), alphas_cumprod_end]
    kept = set(keep)
    dtype = torch.float16 if round_states else torch.float32
    states: list[Tensor] = []
    predictions: list[tuple[Tensor, Tensor]] = []
    copies: list[Tensor] = []  # never read back: only kept states are rounded on the way
    z = noise
    for index, t in enumerate(grid):
        alpha = torch.tensor(alphas[index], device=z.device)
        if index in kept:
            states.append(z.to(dtype))
            _check_finite(states[-1], f"in the state at timestep {t}")
            z = states[-1].float()
        if keep_all:
            copies.append(_copy_half(z, f"in the state at timestep {t}"))
        eps_cond, eps_uncond = predict(z, torch.full((len(z),), t, device=z.device))
        if store_predictions and index in kept:
            if eps_uncond is None:
                raise ValueError("predictions need the unconditional branch")
            both = (predict_x0(z, eps_cond, alpha), predict_x0(z, eps_uncond, alpha))
            predictions.append((both[0].to(dtype), both[1].to(dtype)))
            _check_finite(torch.cat(predictions[-1], dim=1), f"in the predictions at timestep {t}")
        eps = eps_cond if eps_uncond is None else eps_uncond + guidance_scale * (eps_cond - eps_uncond)
        z = ddim_step(z, eps, alpha, torch.tensor(alphas[index + 1], device=z.device))
    states.append(z.to(dtype))
    _check_finite(states[-1], "at the end of the solve")
    if keep_all:
        copies.append(_copy_half(z, "at the end of the solve"))
    return Rollout(
        states=torch.stack(states, dim=1),  # (B, S + 1, C, h, w)
        timesteps=torch.tensor([grid[index] for index in sorted(kept)], dtype=torch.int64),
        x0_cond=torch.stack([pair[0] for pair in predictions], dim=1) if store_predictions else None,
        x0_uncond=torch.stack([pair[1] for pair in predictions], dim=1) if store_predictions else None,
        all_states=torch.stack(copies, dim=1) if keep_all else None,  # (B, N + 1, C, h, w)
    )


def _copy_half(z: Tensor, where: str) -> Tensor:
    copy = z.to(torch.float16, copy=True)
    _check_finite(copy, where)
    return copy


def _check_finite(values: Tensor, where: str) -> None:
    bad = (~torch.isfinite(values)).flatten(1).any(dim=1)  # (B,)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise DataError(
            f"the teacher produced NaN or Inf {where}, sample {row} of the batch of {len(bad)}; "
            "try model.dtype = float32, and check the checkpoint"
        )
