"""The objectives: from a batch's rollouts and the student's calls to one loss a sample.

Each takes the rollouts, the drawn states and `predict`, the student's eps. The arithmetic is in `losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from common.ddim import CLEAN, Predict, consistency_value
from common.errors import UsageError
from common.grids import NUM_TRAIN_TIMESTEPS
from common.schedule import (
    alphas_at,
    ddim_step,
    diffuse,
    guided,
    phase_target_eps,
    phase_target_x0,
    predict_x0,
)
from common.sections import TrainConfig
from common.tensors import Tensors
from stage2_student.training.losses import crossing_loss, elementwise_loss, guided_solver_step
from stage2_student.training.phases import Draws, Phases, placed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollouts(Tensors):
    """One rollout a sample."""

    states: Tensor
    """z at every stored state and the end, (B, S + 1, C, h, w); read as float32."""
    timesteps: Tensor
    """t of the called states, (B, S) int64."""
    x0_cond: Tensor | None = None
    """The teacher's one-step conditional x0 at each called state, (B, S, C, h, w), if recorded."""
    x0_uncond: Tensor | None = None
    """Likewise, unconditional."""
    end_timestep: int = CLEAN
    """t of the end."""

    def at(self, state: Tensor) -> Tensor:
        """Return z at a state of each sample, (B, C, h, w) float32."""
        return self.states[torch.arange(len(state), device=state.device), state].float()

    def timestep(self, state: Tensor) -> Tensor:
        """Return t of a state of each sample, (B,) int64, -1 for the end of most solves."""
        padded = torch.nn.functional.pad(self.timesteps, (0, 1), value=self.end_timestep)  # (B, S + 1)
        return padded.gather(1, state[:, None])[:, 0]

    def labelled(self, phases: Phases) -> Rollouts:
        """Return the rollouts with t of the phases' boundaries as the student will meet them."""
        if phases.labels is None:
            return self
        device = self.timesteps.device
        labels = placed(phases.labels[:-1], device).expand(len(self.timesteps), -1)
        timesteps = self.timesteps.index_copy(1, placed(phases.boundaries[:-1], device), labels)
        return replace(self, timesteps=timesteps, end_timestep=phases.labels[-1])

    def guided_x0(self, state: Tensor, guidance_scale: float) -> Tensor:
        """Return the teacher's guided one-step x0 at a called state of each sample, (B, C, h, w) float32."""
        if self.x0_cond is None or self.x0_uncond is None:
            raise UsageError(
                "this objective needs the teacher's one-step predictions, which these shards do not hold;"
                " precompute with precompute.store_predictions = true"
            )
        rows = torch.arange(len(state), device=state.device)
        return guided(self.x0_cond[rows, state].float(), self.x0_uncond[rows, state].float(), guidance_scale)


def select_rollout(
    states: Tensor, timesteps: Tensor, x0_cond: Tensor | None, x0_uncond: Tensor | None, rollout: Tensor
) -> Rollouts:
    """Pick one of each record's rollouts, or n of them, which follow each other.

    Args:
        states: (B, R, S + 1, C, h, w) float16.
        timesteps: (B, R, S) or (B, S) int64.
        x0_cond: (B, R, S, C, h, w) float16, or None.
        x0_uncond: likewise.
        rollout: which of the R, (B n,) int64.
    """
    rows = torch.arange(len(rollout), device=rollout.device) // (len(rollout) // len(states))

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows, rollout]

    return Rollouts(
        states=states[rows, rollout],
        timesteps=timesteps[rows, rollout] if timesteps.dim() == 3 else timesteps[rows],
        x0_cond=pick(x0_cond),
        x0_uncond=pick(x0_uncond),
    )


Perceive = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(landed, the teacher's, (B, C, h, w); t of the crossing's start and end, (B,) int64) to a loss, (B,) float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """What an objective needs to know besides the data."""

    train: TrainConfig
    phases: Phases
    alphas_cumprod: Tensor
    """The noise schedule, (1000,) float32, on the training device."""
    perceive: Perceive | None = None
    """What the frozen base's view of a landed state adds to the loss (`training.perception`)."""


def phased_loss(
    rollouts: Rollouts, draws: Draws, predict: Predict, predict_target: Predict, settings: LossSettings
) -> Tensor:
    """Cross to the end of the phase in one step, from its start or any stored state; (B, C, h, w) float32.

    The target is the teacher's own z_e.

    Source: Salimans & Ho 2022, appendix G, over a phase instead of two solver steps.
    """
    rollouts, end = rollouts.labelled(settings.phases), settings.phases.end(draws.state)
    t = rollouts.timestep(draws.state)
    return _cross(rollouts.at(draws.state), t, rollouts.at(end), rollouts.timestep(end), predict, settings)


def interpolated_loss(
    rollouts: Rollouts, draws: Draws, predict: Predict, predict_target: Predict, settings: LossSettings
) -> Tensor:
    """Cross to the end of the phase from any t on the straight first-order path through it.

    (x0*, eps*) join the phase's stored start and end; t is uniform over the phase, and the state there is
    alpha_t x0* + sigma_t eps*. With loss "landing" an error counts by where it lands.

    Source: Wang et al. 2024 (Rectified Diffusion, arXiv 2410.07303), its phased form.
    """
    rollouts, end = rollouts.labelled(settings.phases), settings.phases.end(draws.state)
    t_start, t_end = rollouts.timestep(draws.state), rollouts.timestep(end)
    z_start, z_end = rollouts.at(draws.state), rollouts.at(end)
    a_start, a_end = alphas_at(settings.alphas_cumprod, t_start), alphas_at(settings.alphas_cumprod, t_end)
    x0 = phase_target_x0(z_start, z_end, a_start, a_end)
    target = phase_target_eps(z_start, z_end, a_start, a_end)
    t = t_start - (draws.position * (t_start - t_end)).long()  # t_end < t <= t_start
    a = alphas_at(settings.alphas_cumprod, t)
    eps = predict(diffuse(x0, target, a), t)
    return crossing_loss(eps, target, a, a_end, kind=settings.train.loss, huber_c=settings.train.huber_c)


def unrolled_loss(
    rollouts: Rollouts, draws: Draws, predict: Predict, predict_target: Predict, settings: LossSettings
) -> Tensor:
    """Walk all M phases as in sampling, and compare every landing with the teacher's; (B, C, h, w) float32.

    From the recorded noise y_0 = z_0, y_k = DDIM(y_{k-1}, eps(y_{k-1}, t_{k-1})) for k = 1 ... M. With l_k the
    crossing loss of y_k against the recorded z_k, the loss is l_M + w mean(l_1 ... l_{M-1}), w being
    train.unrolled_phase_weight. Gradients pass through the whole walk: an error counts by what later steps make of
    it, and these learn to mend it. The walk meets each phase once, so that the phase loss costs no call. A single
    phase is that of `phased_loss`.

    Source: Watson et al. 2022 (DDSS, arXiv 2202.05830), backpropagation through the sampling chain; Zhou et al.
    2024 (SFD, arXiv 2409.19681), the student's own states compared with the teacher's at each step.
    """
    rollouts = rollouts.labelled(settings.phases)
    z, losses = rollouts.states[:, 0].float(), []
    for start, end in pairwise(settings.phases.boundaries):
        here, there = torch.full_like(draws.state, start), torch.full_like(draws.state, end)
        t, t_end = rollouts.timestep(here), rollouts.timestep(there)
        eps = predict(z, t).float()
        losses.append(_crossing_loss(eps, z, t, rollouts.at(there), t_end, settings))
        z = ddim_step(z, eps, alphas_at(settings.alphas_cumprod, t), alphas_at(settings.alphas_cumprod, t_end))
    *inner, last = losses
    return last + settings.train.unrolled_phase_weight * torch.stack(inner).mean(dim=0) if inner else last


def pcm_loss(
    rollouts: Rollouts, draws: Draws, predict: Predict, predict_target: Predict, settings: LossSettings
) -> Tensor:
    """Agree, at the end of the phase, with the student's own value one stored state on.

    The target is f^-(z_{n+1}, t_{n+1} -> e), by `predict_target` without gradient; z_e itself where n + 1 ends it.

    Source: Wang et al. 2024 (Phased Consistency Models, arXiv 2405.18407), equation 7, with the teacher's stored
    state in place of its solver step.
    """
    end, following = settings.phases.end(draws.state), draws.state + 1
    t_next, t_end = rollouts.timestep(following), rollouts.timestep(end)
    z_next, a_end = rollouts.at(following), alphas_at(settings.alphas_cumprod, t_end)
    with torch.no_grad():
        # A sample already at the end is called too, its result unused: the batch stays whole.
        eps_next = predict_target(z_next, t_next.clamp(min=0)).float()
        landed = ddim_step(z_next, eps_next, alphas_at(settings.alphas_cumprod, t_next), a_end)
        z_end = torch.where((following == end).view(-1, 1, 1, 1), z_next, landed)
    return _cross(rollouts.at(draws.state), rollouts.timestep(draws.state), z_end, t_end, predict, settings)


def lcm_loss(
    rollouts: Rollouts, draws: Draws, predict: Predict, predict_target: Predict, settings: LossSettings
) -> Tensor:
    """Latent consistency: f(z_t, t) agrees with f^- one guided solver step on, on noised data.

    Source: Luo et al. 2023 (LCM), algorithm 1, with the teacher's recorded x0_cond and x0_uncond.
    """
    t, z = rollouts.timestep(draws.state), rollouts.at(draws.state)
    a = alphas_at(settings.alphas_cumprod, t)
    t_next = (t - NUM_TRAIN_TIMESTEPS // settings.train.lcm_solver_steps).clamp(min=CLEAN)
    a_next = alphas_at(settings.alphas_cumprod, t_next)
    with torch.no_grad():
        x0 = rollouts.guided_x0(draws.state, settings.train.guidance_scale)
        z_next = guided_solver_step(z, x0, a, a_next)
        eps_next = predict_target(z_next, t_next.clamp(min=0)).float()
        value = consistency_value(z_next, eps_next, t_next.clamp(min=0), a_next)
        target = torch.where((t_next < 0).view(-1, 1, 1, 1), z_next, value)  # the boundary condition
    error = consistency_value(z, predict(z, t).float(), t, a) - target
    return elementwise_loss(error, settings.train.loss, settings.train.huber_c)


def x0_loss(
    rollouts: Rollouts, draws: Draws, predict: Predict, predict_target: Predict, settings: LossSettings
) -> Tensor:
    """Regress the teacher's guided one-step x0 at a stored state: the baseline to measure others against."""
    t, z = rollouts.timestep(draws.state), rollouts.at(draws.state)
    target = rollouts.guided_x0(draws.state, settings.train.guidance_scale)
    x0 = predict_x0(z, predict(z, t).float(), alphas_at(settings.alphas_cumprod, t))
    return elementwise_loss(x0 - target, settings.train.loss, settings.train.huber_c)


def _cross(z: Tensor, t: Tensor, z_end: Tensor, t_end: Tensor, predict: Predict, settings: LossSettings) -> Tensor:
    return _crossing_loss(predict(z, t), z, t, z_end, t_end, settings)


def _crossing_loss(
    eps: Tensor, z: Tensor, t: Tensor, z_end: Tensor, t_end: Tensor, settings: LossSettings
) -> Tensor:
    a, a_end = alphas_at(settings.alphas_cumprod, t), alphas_at(settings.alphas_cumprod, t_end)
    target = phase_target_eps(z, z_end, a, a_end)
    loss = crossing_loss(eps, target, a, a_end, kind=settings.train.loss, huber_c=settings.train.huber_c)
    if settings.perceive is None:
        return loss
    seen = settings.perceive(ddim_step(z, eps.float(), a, a_end), z_end, t, t_end)
    return loss + seen.view(-1, 1, 1, 1)  # the mean of a sample grows by it


Loss = Callable[[Rollouts, Draws, Predict, Predict, LossSettings], Tensor]
"""(rollouts, draws, predict, predict_target, settings) -> elementwise loss, (B, C, h, w) float32."""


def loss_of(train: TrainConfig) -> Loss:
    """Return the configured objective."""
    if train.objective == "phased":
        return interpolated_loss if train.states == "interpolated" else phased_loss
    return {"unrolled": unrolled_loss, "pcm": pcm_loss, "lcm": lcm_loss, "x0": x0_loss}[train.objective]
