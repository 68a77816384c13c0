"""Stable Diffusion 1.5's noise schedule and the closed forms around it.

Symbols: alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alphas_cumprod[t]); z_t = alpha_t x0 + sigma_t eps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.grids import NUM_TRAIN_TIMESTEPS, alphas_cumprod_table, check_steps, trailing_steps


def make_alphas_cumprod() -> Tensor:
    """Return alphas_cumprod, (1000,) float32, computed in float64 as the released checkpoints were."""
    return torch.from_numpy(alphas_cumprod_table())


def trailing_timesteps(num_steps: int) -> Tensor:
    """Return the grid of `common.grids.trailing_steps`, (num_steps,) int64, descending."""
    return torch.from_numpy(trailing_steps(num_steps))


def upstream_timesteps(num_steps: int) -> Tensor:
    """Return AnyText2's own DDIM grid (20 steps: 951, 901 ... 1), (num_steps,) int64, descending.

    Its solve ends at alphas_cumprod[0].

    Raises:
        UsageError: num_steps is not in 1..1000.
    """
    check_steps(num_steps)
    stride = NUM_TRAIN_TIMESTEPS // num_steps
    return torch.arange(0, NUM_TRAIN_TIMESTEPS, stride)[:num_steps].flip(0) + 1


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


def diffuse(x0: Tensor, eps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return the state that clean latents and noise make, z_t = alpha_t x0 + sigma_t eps.

    Args:
        x0: clean latents, (B, C, h, w).
        eps: noise, same shape.
        alphas_cumprod: at each sample's t, broadcastable, in (0, 1].

    Returns:
        z_t, same shape.

    Source: Ho et al. 2020, equation 4.
    """
    return alphas_cumprod.sqrt() * x0 + (1 - alphas_cumprod).sqrt() * eps


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
    return diffuse(predict_x0(noisy_latents, eps, alphas_cumprod), eps, alphas_cumprod_end)


def guided(cond: Tensor, uncond: Tensor, guidance_scale: float) -> Tensor:
    """Return classifier-free guidance u + s (c - u), of x0 or of eps (they are linear in each other).

    Source: Ho & Salimans 2022, equation 6, with s = w + 1.
    """
    return uncond + guidance_scale * (cond - uncond)


def phase_target_x0(
    noisy_latents: Tensor, end_latents: Tensor, alphas_cumprod: Tensor, alphas_cumprod_end: Tensor
) -> Tensor:
    """Return the x0 for which one DDIM step from (z_t, t) lands on z_e.

    x0* = (z_e - (sigma_e / sigma_t) z_t) / (alpha_e - sigma_e alpha_t / sigma_t).

    Args:
        noisy_latents: z_t, (B, C, h, w).
        end_latents: z_e, same shape.
        alphas_cumprod: at t, (B, 1, 1, 1), in (0, 1).
        alphas_cumprod_end: at e, (B, 1, 1, 1), above the one at t; 1 makes x0* = z_e.

    Returns:
        x0*, same shape as z_t.

    Source: Salimans & Ho 2022, appendix G.
    """
    ratio = ((1 - alphas_cumprod_end) / (1 - alphas_cumprod)).sqrt()  # sigma_e / sigma_t
    return (end_latents - ratio * noisy_latents) / (alphas_cumprod_end.sqrt() - ratio * alphas_cumprod.sqrt())


def phase_target_eps(
    noisy_latents: Tensor, end_latents: Tensor, alphas_cumprod: Tensor, alphas_cumprod_end: Tensor
) -> Tensor:
    """Return the eps for which one DDIM step from (z_t, t) lands on z_e: eps* = (z_t - alpha_t x0*) / sigma_t.

    Args and shapes as `phase_target_x0`.

    Source: Salimans & Ho 2022, appendix G.
    """
    target = phase_target_x0(noisy_latents, end_latents, alphas_cumprod, alphas_cumprod_end)
    return predict_eps(noisy_latents, target, alphas_cumprod)


def alphas_at(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Look up alphas_cumprod at each sample's t, 1 where t is below 0 (the end of the solve).

    Args:
        alphas_cumprod: the table, (1000,) float32.
        timesteps: (B,) int64; -1 for the end.

    Returns:
        (B, 1, 1, 1) float32.
    """
    values = alphas_cumprod[timesteps.clamp(min=0)]
    return torch.where(timesteps < 0, torch.ones_like(values), values).view(-1, 1, 1, 1)
