"""The solver's grids by name: where the network is called and where the solve ends."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from common.errors import UsageError
from common.schedule import make_alphas_cumprod, trailing_timesteps, upstream_timesteps

NAMES = ("trailing", "upstream")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """A grid of a DDIM solve."""

    name: str
    """"trailing" (diffusers' spacing, ends at alphas_cumprod = 1) or "upstream" (AnyText2's own)."""
    timesteps: Tensor
    """(N,) int64, descending."""
    alphas_cumprod_end: float
    """Where the solve ends."""

    @property
    def num_steps(self) -> int:
        """Steps of the solve: calls of the network."""
        return len(self.timesteps)


def parse_grid(text: str) -> Grid:
    """Return the grid of a name like "trailing:40" or "upstream:20".

    Raises:
        UsageError: it is none.
    """
    name, _, number = text.partition(":")
    if name not in NAMES or not number.isdecimal():
        raise UsageError(f"grid {text!r}: expected trailing:STEPS or upstream:STEPS, e.g. upstream:20")
    steps = int(number)
    if name == "trailing":
        return Grid(name=name, timesteps=trailing_timesteps(steps), alphas_cumprod_end=1.0)
    end = float(make_alphas_cumprod()[0])
    return Grid(name=name, timesteps=upstream_timesteps(steps), alphas_cumprod_end=end)
