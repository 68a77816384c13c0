"""What the processes of a run agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """A number that is on its way from the device."""

    value: Tensor
    """(), on the CPU, filled when the event has come."""
    arrived: torch.cuda.Event | None


def average_gradients(gradients: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Average gradients over all processes, in place, as DistributedDataParallel does by itself.

    Args:
        gradients: of what it does not wrap, the same ones on every process.
        accelerator: of this launch.
    """
    if accelerator.num_processes == 1 or not gradients:
        return
    total = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
    for gradient, mean in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))


class StopVote:
    """Whether any process was asked to stop, the same on all of them in the same step."""

    def __init__(self, accelerator: Accelerator, *, later: bool) -> None:
        """Begin.

        Args:
            accelerator: of this launch.
            later: give the answer of the step before, which a GPU has by now, instead of waiting for it.
        """
        self._accelerator, self._later = accelerator, later
        self._before: _Answer | None = None

    def agree(self, stop_requested: bool) -> bool:
        """Return whether any process was asked to stop, a step later if so chosen; call it once a step on each.

        Args:
            stop_requested: whether this one was.
        """
        if self._accelerator.num_processes == 1:
            return stop_requested
        asked = self._ask(stop_requested)
        answer, self._before = (self._before, asked) if self._later else (asked, None)
        if answer is None:
            return False
        if answer.arrived is not None:
            answer.arrived.synchronize()
        return float(answer.value) > 0

    def _ask(self, stop_requested: bool) -> _Answer:
        device = self._accelerator.device
        flag = torch.full((), float(stop_requested), device=device)  # no copy, unlike torch.tensor
        total = self._accelerator.reduce(flag, reduction="sum")
        if device.type != "cuda":
            return _Answer(value=total.cpu(), arrived=None)
        value = total.to("cpu", non_blocking=True)  # into page-locked memory
        arrived = torch.cuda.Event()
        arrived.record()
        return _Answer(value=value, arrived=arrived)
