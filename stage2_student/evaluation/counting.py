"""Counting network evaluations by watching the modules themselves, so that a table's costs are measured."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class EvaluationCounter:
    """Counts the samples that pass through each module while it is entered; a context manager."""

    def __init__(self, **modules: nn.Module) -> None:
        """Watch modules.

        Args:
            modules: by the names under which `counts` gives them.
        """
        self._modules = modules
        self._hooks: list[Any] = []
        self.counts = dict.fromkeys(modules, 0)
        """Samples that passed, by name: a guided batch of B counts 2 B."""

    def __enter__(self) -> EvaluationCounter:
        for name, module in self._modules.items():

            def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                self.counts[name] += _batch_size([*args, *kwargs.values()])

            self._hooks.append(module.register_forward_pre_hook(count, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def _batch_size(values: list[Any]) -> int:
    """Return the first dimension of the first tensor that has one."""
    return next(value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim)
