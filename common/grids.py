"""SD1.5's noise schedule and solver grid as plain arrays, for what names them without computing with them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.errors import UsageError

NUM_TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.0120
"""Of SD1.5's "scaled linear" schedule (beta linear in its square root)."""


def alphas_cumprod_table() -> NDArray[np.float32]:
    """Return alphas_cumprod, (1000,) float32, computed in float64 as the released checkpoints were."""
    betas = np.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TRAIN_TIMESTEPS, dtype=np.float64) ** 2
    return np.cumprod(1.0 - betas).astype(np.float32)


def trailing_steps(num_steps: int) -> NDArray[np.int64]:
    """Return the grid t_i = 999 - i 1000 / num_steps, (num_steps,) int64, descending.

    The same as diffusers' DDIMScheduler(timestep_spacing="trailing"); the solve ends at alphas_cumprod = 1.

    Raises:
        UsageError: num_steps is not in 1..1000.
    """
    check_steps(num_steps)
    steps = np.round(np.arange(NUM_TRAIN_TIMESTEPS, 0, -NUM_TRAIN_TIMESTEPS / num_steps))[:num_steps] - 1
    return steps.astype(np.int64)


def check_steps(num_steps: int) -> None:
    """Refuse a number of solver steps that no grid has.

    Raises:
        UsageError: it is not in 1..1000.
    """
    if not 1 <= num_steps <= NUM_TRAIN_TIMESTEPS:
        raise UsageError(f"number of solver steps: received {num_steps}, expected 1 to {NUM_TRAIN_TIMESTEPS}")
