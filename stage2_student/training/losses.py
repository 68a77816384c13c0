"""The mathematics of the training objectives: small pure functions, each with its equation and source.

Symbols: alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alphas_cumprod[t]); the student predicts eps, and
its x0 = (z_t - sigma_t eps) / alpha_t. t is where a crossing starts, e where it ends; at the end of the solve
alphas_cumprod is 1. Every function works in the dtype that it is given; training passes float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.regions import text_cells
from common.schedule import ddim_step, predict_eps


def landing_factor(alphas_cumprod: Tensor, alphas_cumprod_end: Tensor) -> Tensor:
    """Return d z_e / d eps of one DDIM step, sigma_e - sigma_t alpha_e / alpha_t, (B, 1, 1, 1), below 0.

    The step is linear in eps, so an error in eps moves the landing point by this factor times it; squared, it
    is the weight that Rectified Diffusion gives to an eps error.

    Source: Song et al. 2021 (DDIM), equation 12.
    """
    scale = (alphas_cumprod_end / alphas_cumprod).sqrt()
    return (1 - alphas_cumprod_end).sqrt() - (1 - alphas_cumprod).sqrt() * scale


def guided_solver_step(
    noisy_latents: Tensor, x0: Tensor, alphas_cumprod: Tensor, alphas_cumprod_end: Tensor
) -> Tensor:
    """Take one DDIM step with the teacher's guided x0 instead of a network call, (B, C, h, w).

    Source: Luo et al. 2023 (LCM), equation 13 (skipping step, augmented by guidance).
    """
    return ddim_step(
        noisy_latents, predict_eps(noisy_latents, x0, alphas_cumprod), alphas_cumprod, alphas_cumprod_end
    )


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """Return sqrt(error^2 + c^2) - c, elementwise: quadratic within c, linear beyond.

    Written as error^2 / (sqrt(error^2 + c^2) + c), which does not cancel for small errors.

    Source: Song & Dhariwal 2023, equation 8 (elementwise, as LCM's training does).
    """
    square = error**2
    return square / ((square + c**2).sqrt() + c)


def elementwise_loss(error: Tensor, kind: str, huber_c: float) -> Tensor:
    """Return the pseudo-Huber ("huber") or squared ("l2" and "landing") loss of an error, same shape."""
    return pseudo_huber(error, huber_c) if kind == "huber" else error**2


def crossing_loss(
    eps: Tensor,
    target_eps: Tensor,
    alphas_cumprod: Tensor,
    alphas_cumprod_end: Tensor,
    *,
    kind: str,
    huber_c: float,
) -> Tensor:
    """Compare a crossing with its target, element by element.

    Args:
        eps: the student's, (B, C, h, w); compared in float32 whatever it is.
        target_eps: eps*, same shape.
        alphas_cumprod: at t, (B, 1, 1, 1).
        alphas_cumprod_end: at e, (B, 1, 1, 1).
        kind: "huber" or "l2" of eps - eps*, or "landing": (DDIM(z_t, eps) - z_e)^2.
        huber_c: pseudo-Huber's c.

    Returns:
        The loss, (B, C, h, w) float32.
    """
    error = eps.float() - target_eps.float()
    if kind == "landing":
        error = landing_factor(alphas_cumprod, alphas_cumprod_end) * error
    return elementwise_loss(error, kind, huber_c)


def feature_distance(found: Sequence[Tensor], target: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return how far features are from those of a target, (B,): the mean over levels of relative differences.

    d = mean_l  <(f_l - f*_l)^2> / <f*_l^2>, the averages over a sample's channels and weighted cells. So levels
    count alike whatever the size of their features.

    Args:
        found: f_l of each level, (B, C_l, h_l, w_l), any float type.
        target: f*_l, likewise; no gradient passes through them.
        weights: of the cells of each level, (B, 1, h_l, w_l) float32.

    Source: Lin & Yang 2024 (Diffusion Model with Perceptual Loss, arXiv 2401.00110): squared differences of the
    frozen network's own features, there of its middle block alone.
    """
    levels = []
    for one, other, weight in zip(found, target, weights, strict=True):
        one, other = one.float(), other.detach().float()
        scale = per_sample(other.square(), weight).clamp(min=1e-8)
        levels.append(per_sample((one - other).square(), weight) / scale)
    return torch.stack(levels).mean(dim=0)


def mean_score(scores: Sequence[Tensor]) -> Tensor:
    """Return a critic's scores as one figure for each sample, (B,): the mean over levels, of all cells.

    Args:
        scores: of the cells of each level, (B, 1, h_l, w_l) float32.
    """
    return torch.stack([per_sample(score) for score in scores]).mean(dim=0)


def hinge_loss(landed: Sequence[Tensor], recorded: Sequence[Tensor]) -> Tensor:
    """Return how badly a critic tells landed states from recorded ones, (B,): 0 at margins of 1, 2 by ignorance.

    max(0, 1 + D(landed)) + max(0, 1 - D(recorded)), averaged as by `mean_score`.

    Args:
        landed: D of landed states, (B, 1, h_l, w_l) float32 of each level.
        recorded: D of the teacher's.

    Source: Lim & Ye 2017 (Geometric GAN, arXiv 1705.02894), equation 12.
    """
    both = zip(landed, recorded, strict=True)
    return mean_score([(1 + one).relu() + (1 - other).relu() for one, other in both])


def scale_gradient(values: Tensor, factor: Tensor) -> Tensor:
    """Return the same values, whose gradient is multiplied by a factor on its way back.

    Args:
        values: (B, C, h, w).
        factor: (B, 1, h, w).
    """
    return values.detach() + factor * (values - values.detach())


def region_weights(positions: Tensor, size: tuple[int, int], weight: float) -> Tensor:
    """Weigh latent cells by whether they hold text.

    Args:
        positions: the lines' summed position masks, (B, 1, H, W), 0 outside text.
        size: (h, w) of the latents.
        weight: of cells that any masked pixel falls into; others have 1.

    Returns:
        Weights, (B, 1, h, w) float32.
    """
    return 1 + (weight - 1) * text_cells(positions, size)


def per_sample(loss: Tensor, weights: Tensor | None = None) -> Tensor:
    """Average an elementwise loss over each sample.

    Args:
        loss: (B, C, h, w).
        weights: (B, 1, h, w), or None for equal ones. The average is normalised by them, so that a weight moves
            attention between cells and does not change the loss's scale.

    Returns:
        (B,).
    """
    if weights is None:
        return loss.mean(dim=(1, 2, 3))
    weights = weights.expand_as(loss)
    return (weights * loss).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3))
