"""Charts of the distance to the teacher's own solve: against the cost of an image, and along the way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from stage2_student.evaluation.metrics import Estimate
from stage2_student.evaluation.table import RunRow, Summary
from stage2_student.report.charts import Axis, Point, Series, all_widths, legend, line_chart
from stage2_student.report.markup import Markup, join
from stage2_student.report.plots import log_ticks, look, run_series
from stage2_student.report.words import interval

_ROOM = 1.4
"""Factor that a logarithmic axis reaches beyond its points."""
LAST_TIMESTEP = 999
"""Where every solve begins."""


def error_plot(summary: Summary) -> Markup | None:
    """Plot endpoint errors against UNet calls, both logarithmic; None if no run has one above 0."""
    series = run_series(summary.runs, _error_point)
    if not series:
        return None
    calls = sorted({point.x for one in series for point in one.points})
    x = Axis(
        label="UNet calls an image",
        low=calls[0] / _ROOM,
        high=calls[-1] * _ROOM,
        ticks=tuple((value, f"{value:g}") for value in calls),
        logarithmic=True,
    )
    y = _error_axis(series)

    def plot(width: int, height: int) -> Markup:
        return line_chart("Endpoint error against UNet calls", series, x, y, width=width, height=height)

    return join(legend(series), all_widths(plot))


def _error_point(run: RunRow) -> Point | None:
    found = run.endpoint_error
    if not run.unet_evaluations or not found or found.low <= 0:
        return None  # the solve itself: 0 has no place on the scale
    return _point(
        run.unet_evaluations, found, f"{run.label}: {_written(found)}, {run.unet_evaluations:g} UNet calls"
    )


def way_plot(summary: Summary) -> Markup | None:
    """Plot how far each run's states are from the teacher's along the way; None where that was not measured."""
    runs = [run for run in summary.runs if not run.is_ablation and any(row.error.low > 0 for row in run.way)]
    if not runs:
        return None
    series = [_way_series(run, *look(number)) for run, number in zip(runs, count(), strict=False)]
    marks = (LAST_TIMESTEP, 750, 500, 250, 0)
    x = Axis(label="timestep", low=LAST_TIMESTEP, high=0, ticks=tuple((value, f"{value}") for value in marks))
    y = _error_axis(series)

    def plot(width: int, height: int) -> Markup:
        return line_chart("Distance along the way", series, x, y, width=width, height=height)

    return join(legend(series), all_widths(plot))


def _way_series(run: RunRow, color: int, dash: int) -> Series:
    points = tuple(
        _point(max(row.timestep, 0), row.error, f"{run.label}, {_place(row.timestep)}: {_written(row.error)}")
        for row in run.way
        if row.error.low > 0
    )
    return Series(label=run.label, points=points, color=color, dash=dash)


def _place(timestep: int) -> str:
    return "at the end" if timestep < 0 else f"at timestep {timestep}"


def _point(x: float, error: Estimate, note: str) -> Point:
    return Point(x=x, y=error.value, low=error.low, high=error.high, note=note)


def _written(error: Estimate) -> str:
    return f"{error.value:.3g} ({interval(error, 1, 3)})"


def _error_axis(series: Sequence[Series]) -> Axis:
    ends = [end for one in series for point in one.points for end in (point.low, point.high) if end]
    low, high = min(ends) / _ROOM, max(ends) * _ROOM
    return Axis(label="", low=low, high=high, ticks=log_ticks(low, high), logarithmic=True)
