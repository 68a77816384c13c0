"""Whether losses and gradients are finite: looked at in every step, or later without holding up a GPU.

A program that reads a number from a GPU waits for all that it gave the GPU to do, and the GPU then waits for the
program. So steps on a GPU are looked at later: whether one was not finite is kept there, where the optimizer
leaves weights alone from the first such step on (see `LossCheck.add`), and is read before anything is logged or
saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from common.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A step that was not looked at yet."""

    number: int
    losses: Tensor
    """Of each sample on this rank, (B,), on the device."""
    indices: Tensor
    """Of the samples in the set, (B,) int64, on the CPU."""
    mean: Tensor
    """Loss over all ranks, () float64, on the device."""
    norm: Tensor
    """Of the gradient, (), on the device."""


@dataclass(kw_only=True)
class LossCheck:
    """The steps since the last look, the same on every rank."""

    accelerator: Accelerator
    name: Callable[[int], str]
    """A sample's key, by its index."""
    to_lower: str = "train.learning_rate"
    """Settings that may be too high."""
    _steps: list[_Step] = field(default_factory=list)
    _found: Tensor | None = None

    def add(self, number: int, losses: Tensor, indices: Tensor, norm: Tensor) -> Tensor:
        """Take in a step, without waiting for the device.

        Args:
            number: of the step, from 1.
            losses: of each sample on this rank, (B,), on the device.
            indices: of the samples in the set, (B,) int64, on the CPU.
            norm: of the gradient over all ranks, (), on the device.

        Returns:
            1 if this step, or one before it, is not finite on any rank, else 0; () float32 on the device. It is
            what fused optimizers take as `found_inf`: with 1, they change neither weights nor moments.
        """
        mean = losses.double().mean()
        if self.accelerator.num_processes > 1:
            mean = self.accelerator.reduce(mean, reduction="mean")  # not finite on all ranks if it is not on one
        self._steps.append(_Step(number=number, losses=losses, indices=indices, mean=mean, norm=norm))
        finite = mean.isfinite()
        if self.accelerator.scaler is None:
            finite = finite & norm.isfinite()
        found = (~finite).float()
        self._found = found if self._found is None else torch.maximum(self._found, found)
        return self._found

    def look(self) -> list[tuple[float, float]]:
        """Wait for the device; return the mean loss and the gradient's norm of each step since the last look.

        Raises:
            DataError: one of them is not finite; every rank names the first such step, and its samples.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return []
        means = torch.stack([step.mean for step in steps]).tolist()
        norms = torch.stack([step.norm for step in steps]).tolist()
        for step, mean, norm in zip(steps, means, norms, strict=True):
            overflow_is_normal = self.accelerator.scaler is not None  # fp16: the scaler skips the step and adapts
            if not math.isfinite(mean) or not (overflow_is_normal or math.isfinite(norm)):
                self._raise(step, finite=math.isfinite(mean))
        return list(zip(means, norms, strict=True))

    def _raise(self, step: _Step, *, finite: bool) -> None:
        bad: Sequence[int] = step.indices.tolist()
        if not finite:
            bad = step.indices[~step.losses.isfinite().cpu()].tolist()
        if self.accelerator.num_processes > 1:
            bad = gather_object(bad)
        keys = ", ".join(f"{self.name(index)} (index {index})" for index in bad[:8])
        what = "the gradient's norm" if finite else "the loss"
        raise DataError(
            f"step {step.number}: {what} is not finite on sample {keys}"
            f"{f' and {len(bad) - 8} more' if len(bad) > 8 else ''}; nothing was changed by this step: lower"
            f" {self.to_lower}, or look with `verify` for samples that hold NaN; the last checkpoint is intact"
        )
