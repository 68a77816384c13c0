"""Stable Diffusion 1.5's noise schedule and the closed forms around it.

Symbols: alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alphas_cumprod[t]); z_t = alpha_t x0 + sigma_t eps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from common.errors import UsageError

NUM_TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.0120
"""Of SD1.5's "scaled linear" schedule (beta linear in its square root)."""


def make_alphas_cumprod() -> Tensor:
    """Return alphas_cumprod, (1000,) float32, computed in float64 as the released checkpoints were."""
    betas = np.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TRAIN_TIMESTEPS, dtype=np.float64) ** 2
    return torch.from_numpy(np.cumprod(1.0 - betas)).float()


def trailing_timesteps(num_steps: int) -> Tensor:
    """Return the grid t_i = 999 - i 1000 / num_steps, (num_steps,) int64, descending.

    The same as diffusers' DDIMScheduler(timestep_spacing="trailing"); the solve ends at alphas_cumprod = 1.

    Raises:
        UsageError: num_steps is not in 1..1000.
    """
    _check_steps(num_steps)
    steps = np.round(np.arange(NUM_TRAIN_TIMESTEPS, 0, -NUM_TRAIN_TIMESTEPS / num_steps))[:num_steps] - 1
    return torch.from_numpy(steps.astype(np.int64))


def upstream_timesteps(num_steps: int) -> Tensor:
    """Return AnyText2's own DDIM grid (20 steps: 951, 901 ... 1), (num_steps,) int64, descending.

    Its solve ends at alphas_cumprod[0].

    Raises:
        UsageError: num_steps is not in 1..1000.
    """
    _check_steps(num_steps)
    stride = NUM_TRAIN_TIMESTEPS // num_steps
    return torch.arange(0, NUM_TRAIN_TIMESTEPS, stride)[:num_steps].flip(0) + 1


def _check_steps(num_steps: int) -> None:
    if not 1 <= num_steps <= NUM_TRAIN_TIMESTEPS:
        raise UsageError(f"number of solver steps: received {num_steps}, expected 1 to {NUM_TRAIN_TIMESTEPS}")


def predict_x0(noisy_latents: Tensor, eps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Recover clean latents from a noise prediction.

    Args:
        noisy_latents: z_t, (B, C, h, w), VAE-scaled.
        eps: predicted noise, same shape.
        alphas_cumprod: at each sample's t, broadcastable to z_t, in (0, 1].

    Returns:
        x0, same shape.

    Source: Ho et al. 2020, equation 15.
    """
    return (noisy_latents - (1 - alphas_cumprod).sqrt() * eps) / alphas_cumprod.sqrt()


def predict_eps(noisy_latents: Tensor, x0: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return the noise that x0 leaves in z_t; the inverse of `predict_x0` in eps.

    Args:
        noisy_latents: z_t, (B, C, h, w).
        x0: clean latents, same shape.
        alphas_cumprod: at each sample's t, broadcastable, in (0, 1).

    Returns:
        eps, same shape.
    """
    return (noisy_latents - alphas_cumprod.sqrt() * x0) / (1 - alphas_cumprod).sqrt()


def ddim_step(noisy_latents: Tensor, eps: Tensor, alphas_cumprod: Tensor, alphas_cumprod_end: Tensor) -> Tensor:
    """Cross from t to the end of the step along the probability-flow ODE (DDIM, eta = 0).

    Args:
        noisy_latents: z_t, (B, C, h, w).
        eps: predicted noise, same shape.
        alphas_cumprod: at t, broadcastable.
        alphas_cumprod_end: at the end of the step, broadcastable; 1 gives x0 itself.

    Returns:
        z at the end, same shape.

    Source: Song et al. 2021 (DDIM), equation 12.
    """
    x0 = predict_x0(noisy_latents, eps, alphas_cumprod)
    return alphas_cumprod_end.sqrt() * x0 + (1 - alphas_cumprod_end).sqrt() * eps
