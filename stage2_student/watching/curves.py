"""What was measured against the steps of training, as the page's charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from stage2_student.evaluation.metrics import Estimate
from stage2_student.report.charts import Axis, Point, Reference, Series, all_widths, legend, line_chart
from stage2_student.report.markup import Markup, join
from stage2_student.report.plots import TICKS, axis_from_zero, nice_step
from stage2_student.report.words import interval, percent
from stage2_student.watching.log import Measured

Pick = Callable[[Measured], Estimate | None]


def error_curve(measured: Sequence[Measured]) -> Markup | None:
    """Plot the endpoint error by step: over all cells, in those with text, in the others."""
    return _curve(
        "Endpoint error against training steps",
        [
            _series("all of the latents", measured, lambda one: one.endpoint_error, 2),
            _series("in the boxes of text", measured, lambda one: one.endpoint_error_inside, 3, dash=1),
            _series("outside of them", measured, lambda one: one.endpoint_error_outside, 4, dash=2),
        ],
        axis_from_zero,
    )


def accuracy_curve(measured: Sequence[Measured], teacher: Estimate | None) -> Markup | None:
    """Plot Sen. Acc and NED by step, with the Sen. Acc of the teacher's own solves as a line."""
    references = (
        []
        if teacher is None
        else [Reference(label=f"teacher's own solves, Sen. Acc {percent(teacher)}", y=teacher.value)]
    )
    return _curve(
        "Text accuracy against training steps",
        [
            _series("Sen. Acc", measured, lambda one: one.sen_acc, 2),
            _series("NED", measured, lambda one: one.ned, 3, dash=1),
        ],
        lambda _: Axis(label="", low=0, high=1, ticks=tuple((i / 5, f"{20 * i} %") for i in range(6))),
        references,
    )


def color_curve(measured: Sequence[Measured]) -> Markup | None:
    """Plot how far the text's colours are from the teacher's, by step."""
    series = [_series("ΔE of the text from the teacher's", measured, lambda one: one.color, 2)]
    return _curve("Colour against training steps", series, axis_from_zero)


def _series(label: str, measured: Sequence[Measured], pick: Pick, color: int, dash: int = 0) -> Series:
    points = []
    for one in measured:
        if (value := pick(one)) is not None:
            note = f"step {one.step}: {value.value:.3g} ({interval(value, 1, 3)})"
            points.append(Point(x=one.step, y=value.value, low=value.low, high=value.high, note=note))
    return Series(label=label, points=tuple(points), color=color, dash=dash)


def _curve(
    title: str, series: Sequence[Series], y_axis: Callable[[float], Axis], references: Sequence[Reference] = ()
) -> Markup | None:
    series = [one for one in series if one.points]
    points = [point for one in series for point in one.points]
    if not points:
        return None
    x = _steps_axis(max(point.x for point in points))
    y = y_axis(max(point.high if point.high is not None else point.y for point in points))

    def plot(width: int, height: int) -> Markup:
        return line_chart(title, series, x, y, width=width, height=height, references=references)

    return join(legend(series, references), all_widths(plot))


def _steps_axis(last: float) -> Axis:
    step = max(nice_step(last / TICKS), 1)
    ticks = tuple((i * step, f"{i * step:g}") for i in range(math.floor(last / step) + 1))
    return Axis(label="optimizer steps", low=0, high=last, ticks=ticks)
