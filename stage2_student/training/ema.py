"""An exponential moving average of the adapters' weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """The average of parameters over optimizer steps, float32, on their device."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decay: float,
        swapped: Callable[[], None] = lambda: None,
    ) -> None:
        """Start at the parameters' current values.

        Args:
            parameters: what to average, by name.
            decay: of the average, in (0, 1); less in the first steps, so that the start is forgotten.
            swapped: called when the average took the parameters' place, and when they returned.
        """
        self._parameters, self._decay, self._swapped = dict(parameters), decay, swapped
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after an optimizer step.

        Args:
            step: steps done, from 1. The decay is min(decay, (1 + step) / (10 + step)).
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        values, parameters = zip(
            *((self.values[name], p.detach()) for name, p in self._parameters.items()), strict=True
        )
        torch._foreach_lerp_(values, parameters, 1 - decay)  # on a GPU some kernels for all of them

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over stored values."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the network compute with the average; its own weights return afterwards. Not for backward passes."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self.values[name] = self.values[name], parameter.data
        self._swapped()
