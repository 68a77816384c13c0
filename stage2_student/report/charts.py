"""Line charts as inline SVG, drawn for a given width so that their text keeps its size on a small screen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stage2_student.report.markup import Markup, join, tag

FONT_SIZE = 12
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40
"""Room around the plot, pixels: numbers at the left and the bottom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured value."""

    x: float
    y: float
    low: float | None = None
    """Lower end of its interval; None if it has none."""
    high: float | None = None
    note: str = ""
    """Shown when the pointer rests on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one kind."""

    label: str
    points: tuple[Point, ...]
    color: int
    """Index of the page's colours, from 0."""
    markers: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A dashed line at one height."""

    label: str
    y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A scale and where it is marked."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    """Value and text."""
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high one."""
        scale: Callable[[float], float] = math.log if self.logarithmic else float
        span = scale(self.high) - scale(self.low)
        return (scale(value) - scale(self.low)) / span if span else 0.5


def line_chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    width: int,
    height: int,
    references: Sequence[Reference] = (),
) -> Markup:
    """Draw a chart.

    Args:
        title: for readers who cannot see it.
        series: drawn in order.
        x: horizontal axis.
        y: vertical axis.
        width: pixels at which the text has its size.
        height: pixels.
        references: horizontal lines.
    """

    def place_x(value: float) -> float:
        return round(LEFT + x.share(value) * (width - LEFT - RIGHT), 1)

    def place_y(value: float) -> float:
        return round(TOP + (1 - y.share(value)) * (height - TOP - BOTTOM), 1)

    parts = [tag("title", title), *_grid(x, y, place_x, place_y, width, height)]
    for reference in references:
        level = place_y(reference.y)
        parts.append(tag("line", x1=LEFT, x2=width - RIGHT, y1=level, y2=level, class_="reference"))
    for one in series:
        parts += _draw_series(one, place_x, place_y)
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width} {height}",
        role="img",
        class_="chart",
        xmlns="http://www.w3.org/2000/svg",
        font_size=FONT_SIZE,
    )


Place = Callable[[float], float]


def _grid(x: Axis, y: Axis, place_x: Place, place_y: Place, width: int, height: int) -> list[Markup]:
    right, bottom = width - RIGHT, height - BOTTOM
    parts = []
    for value, text in y.ticks:
        level = place_y(value)
        parts.append(tag("line", x1=LEFT, x2=right, y1=level, y2=level, class_="grid"))
        parts.append(tag("text", text, x=LEFT - 8, y=level + 4, text_anchor="end", class_="tick"))
    for value, text in x.ticks:
        column = place_x(value)
        parts.append(tag("line", x1=column, x2=column, y1=bottom, y2=bottom + 5, class_="grid"))
        parts.append(tag("text", text, x=column, y=bottom + 18, text_anchor="middle", class_="tick"))
    parts.append(tag("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(tag("text", x.label, x=(LEFT + right) / 2, y=height - 4, text_anchor="middle", class_="note"))
    return parts


def _draw_series(series: Series, place_x: Place, place_y: Place) -> list[Markup]:
    parts = []
    spots = [(place_x(point.x), place_y(point.y)) for point in series.points]
    if len(spots) > 1:
        parts.append(tag("polyline", points=" ".join(f"{a},{b}" for a, b in spots), class_="line"))
    for point, (column, level) in zip(series.points, spots, strict=True):
        if point.low is not None and point.high is not None:
            low, high = place_y(point.low), place_y(point.high)
            parts.append(tag("line", x1=column, x2=column, y1=low, y2=high, class_="whisker"))
        if series.markers:
            parts.append(tag("circle", tag("title", point.note), cx=column, cy=level, r=4.5, class_="marker"))
    return [tag("g", *parts, class_=f"series c{series.color}")]


def legend(series: Sequence[Series], references: Sequence[Reference] = ()) -> Markup:
    """Return the names of series and reference lines beside their colours."""
    return tag(
        "ul",
        *(tag("li", tag("i", class_=f"swatch c{one.color}"), one.label) for one in series),
        *(tag("li", tag("i", class_="swatch dashed"), one.label) for one in references),
        class_="legend",
    )


def both_widths(draw: Callable[[int, int], Markup]) -> Markup:
    """Draw a chart for a wide and for a narrow screen; the page's style shows one of them.

    Args:
        draw: takes width and height in pixels.
    """
    return join(
        tag("div", draw(1040, 370), class_="only-wide"),
        tag("div", draw(340, 270), class_="only-narrow"),
    )
