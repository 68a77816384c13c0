"""Numbers in words: the same way everywhere on the page."""

from __future__ import annotations

from stage2_student.evaluation.metrics import Estimate


def percent(value: Estimate | float | None) -> str:
    """Write a share, or an estimate's value, as a percentage."""
    if value is None:
        return "–"
    share = value.value if isinstance(value, Estimate) else value
    return f"{100 * share:.1f}\u00a0%"


def interval(estimate: Estimate | None, factor: float = 100, digits: int = 1) -> str:
    """Write the ends of an estimate's interval, in percent unless told otherwise."""
    if estimate is None:
        return ""
    low, high = (f"{factor * end:.{digits}f}" for end in (estimate.low, estimate.high))
    return f"{low} to {high}".replace("-", "−")


def points(estimate: Estimate | None, factor: float = 100, digits: int = 1) -> str:
    """Write a difference with its sign, in percentage points unless told otherwise."""
    return "–" if estimate is None else f"{factor * estimate.value:+.{digits}f}".replace("-", "−")


def verdict(estimate: Estimate, less_is_better: bool = False) -> str:
    """Return "better" or "worse" for a difference beyond chance, "" for one whose interval holds 0."""
    if estimate.low <= 0 <= estimate.high:
        return ""
    return "worse" if (estimate.low > 0) is less_is_better else "better"


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
