"""What a sample costs the UNet, by objective: counted by running its loss on made-up data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from common.schedule import make_alphas_cumprod
from common.sections import TrainConfig
from stage2_student.training.objectives import LossSettings, Rollouts, loss_of
from stage2_student.training.phases import Phases, draw, trains_at_starts

BACKWARD, BACKWARD_FOLDED = 1.5, 2.0
"""Cost of a backward pass in forward passes: gradients of activations, and of the adapters or of all weights that
they are folded into (see stage2_student/student/folding.py)."""
LOOK = 0.3
"""Cost of a pass through the base's down and middle blocks: 0.31 of a forward pass of the released network, 0.27
of the embedded one's, by torch.utils.flop_counter. The critic's heads, 0.001 and 0.07, are not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetWork:
    """What a sample costs the UNet, in rows that go through it."""

    with_gradient: int
    """Forward and backward."""
    without: int
    """Forward alone."""
    looks: int = 0
    """Landed states that the frozen base looks at, beside the teacher's."""

    def passes(self, train: TrainConfig) -> float:
        """Return the work of a sample in forward passes."""
        backward = BACKWARD_FOLDED if train.fold_adapters else BACKWARD
        losses = (train.perceptual_weight > 0) + (train.critic_weight > 0)
        look = LOOK * (
            1 + 2 * losses
        )  # at the teacher's state, and forward and backward at the landed one for each
        return self.without + self.with_gradient * (1 + backward) + self.looks * look

    def __str__(self) -> str:
        without = f" + {self.without}" if self.without else ""
        return f"{self.with_gradient}{without}" + (f", {self.looks} looked at" if self.looks else "")


def count_work(train: TrainConfig, phases: Phases) -> UNetWork:
    """Count the rows that an objective puts through the UNet for a sample, by its loss on made-up data."""
    count = Counter[str]()

    def predict(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        count["with_gradient" if torch.is_grad_enabled() else "without"] += len(noisy_latents)
        return noisy_latents

    rows, states = train.draws_per_sample, phases.num_states
    drawn = draw(
        [(0, 0)], seed=0, num_rollouts=1, phases=phases, starts_only=trains_at_starts(train), per_sample=rows
    )
    rollouts = Rollouts(
        states=torch.zeros(rows, states + 1, 1, 1, 1),
        timesteps=torch.linspace(999, 999 / states, states).long().expand(rows, -1),
        x0_cond=torch.zeros(rows, states, 1, 1, 1),
        x0_uncond=torch.zeros(rows, states, 1, 1, 1),
    )

    def perceive(landed: Tensor, target: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
        count["looks"] += len(landed)
        return torch.zeros(len(landed))

    settings = LossSettings(
        train=train,
        phases=phases,
        alphas_cumprod=make_alphas_cumprod(),
        perceive=perceive if train.looks_at_landings else None,
    )
    with torch.enable_grad():
        loss_of(train)(rollouts, drawn, predict, predict, settings)
    return UNetWork(with_gradient=count["with_gradient"], without=count["without"], looks=count["looks"])
