"""Ranges of a shard's tensors, collected while it is written, merged when the set is looked at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Ranges = dict[str, list[float]]
"""Tensor name to [least, greatest, sum of squares, number of values]."""


def add_tensor(ranges: Ranges, name: str, values: Tensor) -> None:
    """Widen the range of one tensor."""
    wide = values.double()
    least, greatest = (float(value) for value in wide.aminmax())
    merge_into(ranges, {name: [least, greatest, float(wide.square().sum()), float(values.numel())]})


def merge_into(ranges: Ranges, other: Mapping[str, Iterable[float]]) -> None:
    """Merge ranges of other values of the same tensors."""
    for name, values in other.items():
        least, greatest, squares, count = values
        if name in ranges:
            old = ranges[name]
            ranges[name] = [min(old[0], least), max(old[1], greatest), old[2] + squares, old[3] + count]
        else:
            ranges[name] = [least, greatest, squares, count]


def rms(values: Iterable[float]) -> float:
    """Return the root mean square of a range entry."""
    _least, _greatest, squares, count = values
    return math.sqrt(squares / count) if count else 0.0
