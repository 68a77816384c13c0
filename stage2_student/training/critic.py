"""The critic: small heads on the frozen base's features, which learn to tell landed states from recorded ones.

It learns beside the student, from the same features: its losses cost the base no further call. Nothing of it is
needed for sampling, and only checkpoints that a run goes on from hold it.

Source: Sauer et al. 2024 (LADD, arXiv 2403.12015), heads on a frozen denoiser's features of noised latents, hinge
losses; Wang et al. 2024 (Phased Consistency Models, arXiv 2405.18407), the same at the end of each phase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call

from common.sections import TrainConfig
from common.seeding import derive_seed
from stage2_student.training.agreement import average_gradients
from stage2_student.training.losses import hinge_loss, mean_score

WIDTH = 64
"""Channels within a head."""
BETAS = (0.0, 0.99)
"""AdamW's: without momentum, as what is to be told apart changes with every step."""


class Critic(nn.Module):
    """A head for each level of features, its optimizer, and what it found last."""

    def __init__(self, channels: Sequence[int], train: TrainConfig) -> None:
        """Make heads whose first weights depend on train.seed alone.

        Args:
            channels: C_l of each level of features.
            train: critic_learning_rate, gradient_accumulation and seed are used.
        """
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(train.seed, "critic"))
            self.heads = nn.ModuleList(map(_head, channels))
        self.optimizer = torch.optim.AdamW(
            self.heads.parameters(), lr=train.critic_learning_rate, betas=BETAS, weight_decay=0.0
        )
        self._accumulation = train.gradient_accumulation
        self._losses: list[Tensor] = []
        self._last = torch.zeros(())

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Score every cell of every level, higher for what looks recorded.

        Args:
            features: (B, C_l, h_l, w_l) of each level, any float type.

        Returns:
            (B, 1, h_l, w_l) float32 of each level.
        """
        return [head(level.float()) for head, level in zip(self.heads, features, strict=True)]

    def judge(self, landed: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """Return the student's loss: minus the scores of its landed states, (B,).

        Gradients reach the features and not the heads.

        Args:
            landed: features of landed states, as of `forward`.
            weights: of the cells of each level, (B, 1, h_l, w_l) float32.
        """
        fixed = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return -mean_score(functional_call(self, fixed, (landed,)), weights)

    def learn(self, landed: Sequence[Tensor], recorded: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Add to the heads' gradients what tells landed states from recorded ones; the student's get nothing.

        Args:
            landed: features of landed states, as of `forward`.
            recorded: of the teacher's, noised alike.
            weights: of the cells of each level, (B, 1, h_l, w_l) float32.
        """
        scores = [self([level.detach() for level in features]) for features in (landed, recorded)]
        loss = hinge_loss(scores[0], scores[1], weights).mean()
        torch.autograd.backward(loss / self._accumulation, inputs=list(self.parameters()))
        self._losses.append(loss.detach())

    def step(self, accelerator: Accelerator) -> None:
        """Do an optimizer step with the gradients so far, averaged over all processes.

        Elements that are not finite count as 0: with fp16 a student's step may overflow, and is left out.
        """
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        average_gradients(gradients, accelerator)
        for gradient in gradients:
            gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._last, self._losses = torch.stack(self._losses).mean(), []

    def facts(self, accelerator: Accelerator) -> dict[str, float]:
        """Return what to log: the critic's loss in the last step. 2: it can tell nothing; 0: everything."""
        last = self._last
        if accelerator.num_processes > 1:
            last = accelerator.reduce(last, reduction="mean")
        return {"critic_loss": float(last)}

    def named(self) -> Mapping[str, nn.Parameter]:
        """Return the heads' parameters by the names that checkpoints have for them."""
        return {f"critic.{name}": parameter for name, parameter in self.named_parameters()}


def _head(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.GroupNorm(1, channels, affine=False),  # levels differ in size by far
        nn.Conv2d(channels, WIDTH, 1),
        nn.SiLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(WIDTH, 1, 1),
    )
