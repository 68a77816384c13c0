"""The one solve: DDIM over a grid, and what its steps are made of.

Teacher, student and the training of the embedded teacher all walk this way; what each does on it (rounding,
copies, another kind of step) is handed in. Symbols as in `schedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UsageError
from common.schedule import (
    alphas_at,
    ddim_step,
    make_alphas_cumprod,
    predict_x0,
    trailing_timesteps,
    upstream_timesteps,
)

CLEAN = -1
"""Where a solve ends whose last state is x0 itself: alphas_cumprod is 1 there."""

LCM_SIGMA_DATA = 0.5
"""sigma_data of the boundary condition (Luo et al. 2023, appendix C)."""
LCM_TIMESTEP_SCALING = 10.0
"""What t is multiplied by in the boundary condition (Luo et al. 2023, appendix C)."""


Predict = Callable[[Tensor, Tensor], Tensor]
"""(z_t (B, C, h, w), t (B,) int64) to eps, (B, C, h, w)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Crossing:
    """One step of a solve, for B samples."""

    index: int
    """Of the step in its grid."""
    timesteps: Tensor
    """t at which the network is called, (B,) int64."""
    timesteps_end: Tensor
    """Where the step ends, (B,) int64; `CLEAN` at the end of most solves."""
    alphas_cumprod: Tensor
    """At t, (B, 1, 1, 1) float32."""
    alphas_cumprod_end: Tensor
    """At the end of the step, (B, 1, 1, 1) float32."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """Where a solve calls the network, and where it ends."""

    timesteps: Tensor
    """(N,) int64, descending; (N, B) if each sample has its own."""
    end: Tensor
    """t at the end, () or (B,) int64; `CLEAN` for x0."""

    @property
    def num_steps(self) -> int:
        """Calls of the network, N."""
        return len(self.timesteps)

    def crossings(self, count: int, device: torch.device) -> Iterator[Crossing]:
        """Yield the steps of a solve of `count` samples, in order."""
        table = make_alphas_cumprod().to(device)
        stops = torch.cat([self.timesteps, self.end[None]]).to(device)  # (N + 1,) or (N + 1, B)
        for index in range(self.num_steps):
            now, later = stops[index].expand(count), stops[index + 1].expand(count)  # (B,)
            yield Crossing(
                index=index,
                timesteps=now,
                timesteps_end=later,
                alphas_cumprod=alphas_at(table, now),
                alphas_cumprod_end=alphas_at(table, later),
            )


def trailing_grid(num_steps: int) -> Grid:
    """Return the grid that stage one records on and students are called on; see `trailing_timesteps`."""
    return Grid(timesteps=trailing_timesteps(num_steps), end=torch.tensor(CLEAN))


def upstream_grid(num_steps: int) -> Grid:
    """Return AnyText2's own grid, which ends at t = 0; see `upstream_timesteps`."""
    return Grid(timesteps=upstream_timesteps(num_steps), end=torch.tensor(0))


def parse_grid(text: str) -> Grid:
    """Return the grid of a name like "trailing:40" or "upstream:20".

    Raises:
        UsageError: it is none.
    """
    name, _, steps = text.partition(":")
    grids = {"trailing": trailing_grid, "upstream": upstream_grid}
    if name not in grids or not steps.isdecimal():
        raise UsageError(f"grid {text!r}: expected trailing:STEPS or upstream:STEPS, e.g. upstream:20")
    return grids[name](int(steps))


def cross_by_ddim(noisy_latents: Tensor, eps: Tensor, crossing: Crossing) -> Tensor:
    """Take a step of `ddim_step` from z_t, (B, C, h, w)."""
    return ddim_step(noisy_latents, eps, crossing.alphas_cumprod, crossing.alphas_cumprod_end)


def integrate(
    predict: Predict,
    noise: Tensor,
    grid: Grid,
    on_step: Callable[[int, Tensor], Tensor] | None = None,
    *,
    cross: Callable[[Tensor, Tensor, Crossing], Tensor] = cross_by_ddim,
) -> Tensor:
    """Walk from noise to the end of a grid.

    Args:
        predict: the network, with whatever conditions and guides it.
        noise: z at the first timestep, (B, C, h, w) float32.
        grid: where the network is called and where the solve ends.
        on_step: given each state on the way with its index, 0 to N, the end included; returns the state to go on
            from.
        cross: takes (z_t, eps, crossing) to the state at the step's end.

    Returns:
        The state at the end, (B, C, h, w).

    Source: Song et al. 2021 (DDIM), equation 12.
    """
    z = noise
    for crossing in grid.crossings(len(noise), noise.device):
        if on_step is not None:
            z = on_step(crossing.index, z)
        z = cross(z, predict(z, crossing.timesteps), crossing)
    return z if on_step is None else on_step(grid.num_steps, z)


# Latent consistency.


def boundary_scalings(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return c_skip, c_out at t, (B, 1, 1, 1) float32: f(z, t) = c_skip z + c_out x0, the identity at t = 0.

    c_skip = sigma_data^2 / ((10 t)^2 + sigma_data^2), c_out = 10 t / sqrt((10 t)^2 + sigma_data^2).

    Args:
        timesteps: t, (B,) int64.

    Source: Song et al. 2023 (consistency models), equation 9, as set by Luo et al. 2023, appendix C.
    """
    scaled = LCM_TIMESTEP_SCALING * timesteps.float().view(-1, 1, 1, 1)
    variance = scaled**2 + LCM_SIGMA_DATA**2
    return LCM_SIGMA_DATA**2 / variance, scaled / variance.sqrt()


def consistency_value(noisy_latents: Tensor, eps: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return f(z_t, t) = c_skip z_t + c_out x0(z_t, eps), (B, C, h, w).

    Source: Luo et al. 2023 (LCM), equation 9.
    """
    c_skip, c_out = boundary_scalings(timesteps)
    return c_skip * noisy_latents + c_out * predict_x0(noisy_latents, eps, alphas_cumprod)
