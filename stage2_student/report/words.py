"""Numbers in words: the same way everywhere on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def percent(value: Mapping[str, Any] | float | None) -> str:
    """Write a share, or an estimate's value, as a percentage."""
    if value is None:
        return "–"
    share = value["value"] if isinstance(value, Mapping) else value
    return f"{100 * share:.1f}\u00a0%"


def interval(estimate: Mapping[str, Any] | None) -> str:
    """Write the ends of an estimate's interval."""
    if estimate is None:
        return ""
    return f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}".replace("-", "−")


def points(estimate: Mapping[str, Any] | None) -> str:
    """Write a difference in percentage points, with its sign."""
    return "–" if estimate is None else f"{100 * estimate['value']:+.1f}".replace("-", "−")


def seconds(value: float) -> str:
    """Write a duration."""
    if value == 0:
        return "–"
    if value >= 100:
        return f"{value:.0f} s"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def evaluations(value: float) -> str:
    """Write a number of network evaluations."""
    return f"{value:g}" if value else "–"
