"""The critic: small heads on the frozen base's features, which learn to tell landed states from recorded ones.

It learns beside the student, from the features that the student's loss needs anyway. Nothing of it is needed for
sampling; only checkpoints that a run goes on from hold it.

Source: Sauer et al. 2024 (LADD, arXiv 2403.12015), heads on a frozen denoiser's features of noised latents, hinge
losses; Wang et al. 2024 (Phased Consistency Models, arXiv 2405.18407), the same at the end of each phase.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.func import functional_call

from common.sections import TrainConfig
from common.seeding import generator
from stage2_student.training.agreement import average_gradients
from stage2_student.training.losses import hinge_loss, mean_score

WIDTH = 32
"""Channels within a head."""
BETAS = (0.0, 0.99)
"""AdamW's: without momentum, as what is to be told apart changes with every step."""


class Critic(nn.Module):
    """A head for each level of features, its optimizer, and how well it told the states of the last step apart."""

    def __init__(self, channels: Sequence[int], train: TrainConfig) -> None:
        """Make heads whose first weights depend on train.seed alone.

        Args:
            channels: C_l of each level of features.
            train: critic_learning_rate, gradient_accumulation and seed are used.
        """
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.heads = nn.ModuleList(map(_head, channels))
        drawn = generator(train.seed, "critic")
        for layer in (layer for layer in self.modules() if isinstance(layer, nn.Conv2d)):
            assert layer.bias is not None
            nn.init.kaiming_normal_(layer.weight, generator=drawn)
            nn.init.zeros_(layer.bias)
        self.optimizer = torch.optim.AdamW(
            self.heads.parameters(), lr=train.critic_learning_rate, betas=BETAS, weight_decay=0.0
        )
        self._accumulation, self._settled = train.gradient_accumulation, False
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

    def score(self, landed: Sequence[Tensor], recorded: Sequence[Tensor]) -> Tensor:
        """Score landed states, (B,), and learn from them; the heads' gradients grow by what this teaches.

        Gradients of the scores reach the features of landed states and not the heads; those of what is learnt
        reach the heads alone.

        Args:
            landed: features of landed states, as of `forward`.
            recorded: of the teacher's, noised alike.
        """
        self._settle(recorded)
        fixed = {name: parameter.detach() for name, parameter in self.named_parameters()}
        scores: Tensor = mean_score(functional_call(self, fixed, (landed,)))
        apart = [self([level.detach() for level in features]) for features in (landed, recorded)]
        loss = hinge_loss(apart[0], apart[1]).mean()
        torch.autograd.backward(loss / self._accumulation, inputs=list(self.parameters()))
        self._losses.append(loss.detach())
        return scores

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
        """Return what to log: its loss in the last step. 2: it tells nothing apart; 0: everything."""
        last = self._last
        if accelerator.num_processes > 1:
            last = accelerator.reduce(last, reduction="mean")
        return {"critic_loss": float(last)}

    def named(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by the names that checkpoints have for it."""
        return {f"critic.{name}": parameter for name, parameter in self.named_parameters()}

    def values(self) -> dict[str, Tensor]:
        """Return all that a run has to find again, likewise: what is trained, and the sizes of features."""
        return {f"critic.{name}": tensor for name, tensor in self.state_dict(keep_vars=True).items()}

    def _settle(self, recorded: Sequence[Tensor]) -> None:
        """Note the sizes of features, by the first that are seen; a checkpoint brings those of its run."""
        if not self._settled:
            standards = [module for module in self.modules() if isinstance(module, _Standardised)]
            if not bool(standards[0].spread.any()):
                for standard, level in zip(standards, recorded, strict=True):
                    standard.settle(level.float())
            self._settled = True


class _Standardised(nn.Module):
    """Channels less a mean, over their spread; both of the first recorded states that were seen.

    Without it what all images share, which is most of every feature, hides what tells them apart.

    Source: Salimans & Kingma 2016 (Weight Normalization, arXiv 1602.07868), section 3, for the idea.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("spread", torch.zeros(channels, 1, 1))

    def settle(self, features: Tensor) -> None:
        """Take mean and spread from the features of all processes, (B, C, h, w) on each."""
        self.mean.copy_(_over_processes(features))
        self.spread.copy_(_over_processes((features - self.mean).square()).clamp(min=1e-8).sqrt())

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.spread


def _over_processes(features: Tensor) -> Tensor:
    """Average channels over samples, cells and processes, (C, 1, 1)."""
    mean: Tensor = reduce(features.mean(dim=(0, 2, 3)), reduction="mean")
    return mean[:, None, None]


def _head(channels: int) -> nn.Sequential:
    return nn.Sequential(
        _Standardised(channels),
        nn.Conv2d(channels, WIDTH, 1),
        nn.SiLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(WIDTH, 1, 1),
    )
