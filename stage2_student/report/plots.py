"""The report's charts: accuracy against steps, and loss curves."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count

from stage2_student.evaluation.table import RunRow, Summary
from stage2_student.report.charts import Axis, Point, Reference, Series, all_widths, legend, line_chart
from stage2_student.report.data import Training
from stage2_student.report.markup import Markup, join
from stage2_student.report.words import interval, percent

COLORS, DASHES = 8, 4
"""Of the page's style; the first two colours are the teacher's alone."""
_TEACHERS = ("teacher, trailing grid", "teacher, AnyText2's own grid")
_UNGUIDED = "teacher, trailing grid, no guidance"
TICKS = 5
"""Marks on an axis, about."""
MAX_CURVE_POINTS = 240
"""A longer curve is averaged into this many points."""


def accuracy_plot(summary: Summary) -> Markup | None:
    """Plot Sen. Acc against steps, with intervals; None if no run has steps."""
    series = run_series(summary.runs, _accuracy_point)
    if not series:
        return None
    references = [
        Reference(label=f"{run.label}, {percent(run.sen_acc)}", y=run.sen_acc.value)
        for run in summary.runs
        if run.kind in ("truth", "vae") and run.sen_acc
    ][-1:]  # the VAE's if there is one: nothing sampled through it can be read better
    steps = sorted({point.x for one in series for point in one.points})
    x = Axis(
        label="solver steps",
        low=steps[0] / 1.4,
        high=steps[-1] * 1.4,
        ticks=tuple((step, f"{step:g}") for step in steps),
        logarithmic=True,
    )
    y = Axis(label="", low=0, high=1, ticks=tuple((i / 5, f"{20 * i} %") for i in range(6)))

    def plot(width: int, height: int) -> Markup:
        return line_chart(
            "Sen. Acc against solver steps", series, x, y, width=width, height=height, references=references
        )

    return join(legend(series, references), all_widths(plot))


def _accuracy_point(run: RunRow) -> Point | None:
    value = run.sen_acc
    if not run.steps or not value:
        return None
    note = f"{run.label}: {percent(value)} ({interval(value)})"
    return Point(x=run.steps, y=value.value, low=value.low, high=value.high, note=note)


def run_series(runs: Sequence[RunRow], point_of: Callable[[RunRow], Point | None]) -> list[Series]:
    """Group runs to curves: the teacher on each kind of grid, the students of each objective.

    Args:
        runs: what leaves a part out is on no curve.
        point_of: a run's point, None if it has none.
    """
    groups: dict[str, list[Point]] = {}
    for run in runs:
        if not run.is_ablation and (point := point_of(run)) is not None:
            groups.setdefault(_group_of(run), []).append(point)
    students = [label for label in groups if label not in (*_TEACHERS, _UNGUIDED)]
    looks = {label: (color, 0) for color, label in enumerate(_TEACHERS)} | {_UNGUIDED: (0, 1)}
    looks |= {label: look(index) for index, label in enumerate(students)}
    series = [
        Series(
            label=label,
            points=tuple(sorted(groups[label], key=lambda point: point.x)),
            color=color,
            dash=dash,
        )
        for label, (color, dash) in looks.items()
        if label in groups
    ]
    return _side_by_side(series)


def _side_by_side(series: Sequence[Series]) -> list[Series]:
    """Move points of equal x apart, so that every one is seen."""
    totals: dict[float, int] = defaultdict(int)
    for one in series:
        for point in one.points:
            totals[point.x] += 1
    placed: dict[float, int] = defaultdict(int)
    moved = []
    for one in series:
        points = []
        for point in one.points:
            points.append(dataclasses.replace(point, shift=placed[point.x] - (totals[point.x] - 1) / 2))
            placed[point.x] += 1
        moved.append(dataclasses.replace(one, points=tuple(points)))
    return moved


def look(index: int) -> tuple[int, int]:
    """Return colour and dash of the student, or training run, of a number: distinct for the first 24."""
    free = COLORS - len(_TEACHERS)
    return len(_TEACHERS) + index % free, index // free % DASHES


def _group_of(run: RunRow) -> str:
    if run.kind == "student":
        return f"students, {run.settings.get('objective', 'trained')}"
    if str(run.settings.get("grid", "")).startswith("upstream"):
        return _TEACHERS[1]
    return _UNGUIDED if run.is_unguided else _TEACHERS[0]


def loss_plot(trainings: Sequence[Training]) -> Markup | None:
    """Plot the loss of training runs, on a logarithmic scale; None if there are none."""
    curves = [
        curve
        for run in trainings
        for curve in ((run.name, run.losses), (f"{run.name}, held-out records", run.held_out_losses))
        if curve[1]
    ]
    series = [
        Series(label=label, points=tuple(_smooth(losses)), color=color, dash=dash, markers=False)
        for (label, losses), (color, dash) in zip(curves, map(look, count()), strict=False)
    ]
    values = [point.y for one in series for point in one.points if point.y > 0]
    if not values:
        return None
    last = max(point.x for one in series for point in one.points)
    step = nice_step(last / TICKS)
    x = Axis(
        label="optimizer steps",
        low=0,
        high=last,
        ticks=tuple((i * step, f"{i * step:g}") for i in range(int(last / step) + 1)),
    )
    low, high = min(values), max(values)
    y = Axis(label="", low=low / 1.1, high=high * 1.1, ticks=log_ticks(low / 1.1, high * 1.1), logarithmic=True)

    def plot(width: int, height: int) -> Markup:
        return line_chart("Loss against optimizer steps", series, x, y, width=width, height=height)

    return join(legend(series), all_widths(plot))


def _smooth(losses: Sequence[tuple[int, float]]) -> list[Point]:
    """Average neighbours so that at most MAX_CURVE_POINTS are left; a loss of 0 cannot be on the scale."""
    kept = [(step, loss) for step, loss in losses if loss > 0]
    size = max(1, math.ceil(len(kept) / MAX_CURVE_POINTS))
    chunks = [kept[start : start + size] for start in range(0, len(kept), size)]
    return [Point(x=chunk[-1][0], y=sum(loss for _, loss in chunk) / len(chunk)) for chunk in chunks]


def nice_step(rough: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that is at least as large."""
    power = 10 ** math.floor(math.log10(rough))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9)))


def axis_from_zero(highest: float) -> Axis:
    """Return an upright scale from 0 to a round number at or above the highest value."""
    step = nice_step(max(highest, 1e-9) / TICKS)
    count = math.ceil(highest / step * (1 - 1e-9)) or 1
    return Axis(
        label="", low=0, high=count * step, ticks=tuple((i * step, f"{i * step:g}") for i in range(count + 1))
    )


def log_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Mark 1, 2 and 5 times powers of ten in a range, or only its ends if it is narrow."""
    marks = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in (1, 2, 5)
        if low <= factor * 10.0**power <= high
    ]
    return tuple((value, f"{value:.3g}") for value in (marks if len(marks) > 1 else [low, high]))
