"""Muon: momentum whose matrices are made orthogonal before they are applied.

Early in the denoiser's training it needs about 0.6 of AdamW's steps (docs/results.md). torch has it since 2.9,
with products in bfloat16: on a CPU without bfloat16 arithmetic they take twenty times as long as in float32.
This one computes in float32 and takes convolutions.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the update's size follows Liu et al. 2025,
arXiv 2502.16982, so that AdamW's learning rates fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz step; they bring all singular values to 0.7 to 1.2 within five steps."""
STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring all singular values of matrices (N, rows, columns) near 1."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For weights of two dimensions and more; a convolution counts as its (outputs, inputs x taps) matrix."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float = 1e-3, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients, those of equal shape in one go; parameters without one are left alone."""
        for group in self.param_groups:
            by_shape = defaultdict[torch.Size, list[nn.Parameter]](list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step(parameters, group["lr"], group["momentum"])

    def _step(self, parameters: list[nn.Parameter], rate: float, momentum: float) -> None:
        directions = []
        for parameter in parameters:
            assert parameter.grad is not None
            average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            average.lerp_(parameter.grad, 1 - momentum)
            directions.append(parameter.grad.lerp(average, momentum).flatten(1))  # Nesterov's look ahead
        rows, columns = directions[0].shape
        updates = orthogonalize(torch.stack(directions)) * (0.2 * max(rows, columns) ** 0.5)
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.add_(update.reshape(parameter.shape), alpha=-rate)
