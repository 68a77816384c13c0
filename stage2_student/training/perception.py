"""The perceptual loss: a landed state and the teacher's, as the frozen base sees them.

Both are noised alike to a t' within the crossing, and the base's features of both are compared. The base is the
network that is trained, with its adapters off: no second network, no guidance, no solve and no cache.

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
from stage2_student.training.losses import feature_distance, region_weights
from stage2_student.training.objectives import Perceive
from stage2_student.training.phases import Draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Perception:
    """Compares states by what the base sees in them."""

    features: BaseFeatures
    train: TrainConfig
    alphas_cumprod: Tensor
    """The noise schedule, (1000,) float32, on the training device."""

    def of_batch(
        self,
        conditioning: ConditioningBatch,
        draws: Draws,
        samples: Sequence[tuple[int, int]],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> Perceive:
        """Return what compares the states of a batch.

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
            timesteps = t_end + 1 + (draws.position * (t - t_end)).long()  # t_end < t' <= t
            both = [self._noised(state, noise, t_end, timesteps) for state in (landed, target)]
            with autocast():
                found = self.features(both[0].to(context.dtype), timesteps, context, mask)
                with torch.no_grad():
                    aimed_at = self.features(both[1].to(context.dtype), timesteps, context, mask)
            sizes = [(int(level.shape[-2]), int(level.shape[-1])) for level in found]
            weights = [region_weights(positions, size, self.train.perceptual_text_weight) for size in sizes]
            return feature_distance(found, aimed_at, weights)

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
