"""Counting network evaluations by watching the modules themselves, so that a table's costs are measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def count_evaluations(**modules: nn.Module) -> Iterator[dict[str, int]]:
    """Count the samples that pass through modules: a guided batch of B counts 2 B.

    Args:
        modules: by the names under which they are counted.

    Yields:
        Samples that passed so far, by name.
    """
    counts = dict.fromkeys(modules, 0)
    with ExitStack() as hooks:
        for name, module in modules.items():

            def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                counts[name] += _batch_size([*args, *kwargs.values()])

            hooks.callback(module.register_forward_pre_hook(count, with_kwargs=True).remove)
        yield counts


def _batch_size(values: list[Any]) -> int:
    """Return the first dimension of the first tensor that has one."""
    return next(value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim)
