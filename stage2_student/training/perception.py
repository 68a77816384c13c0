"""A landed state and the teacher's, as the frozen base sees them: the perceptual loss, and what a critic says.

Both are noised alike to a t' within the crossing. The perceptual loss compares the base's features of both; the
critic (`training.critic`) judges those of the landed state, and learns from both. The base is the network that is
trained, with its adapters off: no second network, no guidance, no solve and no cache.

Source: Lin & Yang 2024 (Diffusion Model with Perceptual Loss, arXiv 2401.00110), its self-perceptual objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.anytext2.conditioning import ConditioningBatch
from common.schedule import alphas_at
from common.sections import TrainConfig
from common.seeding import generator
from stage2_student.student.base_features import BaseFeatures
from stage2_student.training.critic import Critic
from stage2_student.training.losses import feature_distance, region_weights, scale_gradient
from stage2_student.training.objectives import Perceive
from stage2_student.training.phases import Draws

LOW = 3
"""Power of a uniform draw that says where in the crossing t' lies: half of them in its lowest eighth. More noise
hides what tells landed states from recorded ones: the embedded network's base sees little of it above t = 300."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perception:
    """Turns what the base sees of states into a loss."""

    features: BaseFeatures
    train: TrainConfig
    alphas_cumprod: Tensor
    """The noise schedule, (1000,) float32, on the training device."""
    critic: Critic | None = None
    """Judges, and learns, only where gradients are wanted: never from records that are not trained on."""

    def of_batch(
        self,
        conditioning: ConditioningBatch,
        draws: Draws,
        samples: Sequence[tuple[int, int]],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> Perceive:
        """Return what looks at the states of a batch, and gives the weighted loss of each.

        Args:
            conditioning: of B images, where and in the type that the network computes.
            draws: n of each image; `position` says where in its crossing t' lies.
            samples: (epoch, index in the set) of each image, which key the noise.
            autocast: gives the context under which the network computes.
        """
        repeats = len(draws.state) // len(conditioning)
        context, mask = conditioning.image_context, conditioning.context_mask
        context = context.repeat_interleave(repeats, dim=0)
        mask = None if mask is None else mask.repeat_interleave(repeats, dim=0)
        positions = conditioning.hints.positions.repeat_interleave(repeats, dim=0)
        noise = self._noise(samples, repeats, conditioning.hints.masked_latents)

        def perceive(landed: Tensor, target: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
            critic = self.critic if torch.is_grad_enabled() else None
            loss = torch.zeros(len(landed), device=landed.device)
            if critic is None and not self.train.perceptual_weight:
                return loss
            timesteps = t_end + 1 + (draws.position**LOW * (t - t_end)).long()  # t_end < t' <= t

            def see(state: Tensor) -> list[Tensor]:
                noised = self._noised(state, noise, t_end, timesteps)
                with autocast():
                    return self.features(noised.to(context.dtype), timesteps, context, mask)

            with torch.no_grad():
                aimed_at = see(target)
            if self.train.perceptual_weight:
                sizes = [(int(level.shape[-2]), int(level.shape[-1])) for level in aimed_at]
                weights = [region_weights(positions, size, self.train.perceptual_text_weight) for size in sizes]
                loss = loss + self.train.perceptual_weight * feature_distance(see(landed), aimed_at, weights)
            if critic is not None:
                size = (int(landed.shape[-2]), int(landed.shape[-1]))
                pull = region_weights(positions, size, self.train.critic_text_weight)
                found = see(scale_gradient(landed, pull))
                score = critic.score(found, aimed_at)
                loss = loss - self.train.critic_weight * (score - score.detach())  # a gradient, and no value
            return loss

        return perceive

    def _noise(self, samples: Sequence[tuple[int, int]], repeats: int, like: Tensor) -> Tensor:
        """Draw a noise of a latent's shape for each row, on the CPU, so that devices agree."""
        drawn = [
            torch.randn(
                like.shape[1:], generator=generator(self.train.seed, epoch, index, "perceptual noise", number)
            )
            for epoch, index in samples
            for number in range(repeats)
        ]
        noise = torch.stack(drawn)
        if like.device.type == "cuda":  # or the copy would wait for what the device has still to do
            noise = noise.pin_memory()
        return noise.to(like.device, non_blocking=True)

    def _noised(self, state: Tensor, noise: Tensor, now: Tensor, later: Tensor) -> Tensor:
        """Take states from t to a noisier t': alpha' / alpha z + sqrt(1 - (alpha' / alpha)^2) noise."""
        kept = alphas_at(self.alphas_cumprod, later) / alphas_at(self.alphas_cumprod, now)
        return kept.sqrt() * state + (1 - kept).sqrt() * noise
