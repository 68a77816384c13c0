"""Line charts as inline SVG, laid out for a given width so that their text keeps its size on a small screen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stage2_student.report.markup import Markup, join, tag

FONT_SIZE = 12
CHARACTER = 7.7
"""Width of a digit, pixels, in the widest of the page's fonts."""
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40
"""Least room around the plot, pixels: numbers at the left and the bottom."""
SLOT = 9
"""Pixels between points that are moved aside for each other."""


Spot = tuple[float, float]
"""A place in the picture."""


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
    shift: float = 0
    """Places that it is put to the right of x, so that points of equal x do not hide each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one kind, joined by a line where there is one of them at an x; several are alternatives."""

    label: str
    points: tuple[Point, ...]
    """By ascending x."""
    color: int
    """Index of the page's colours, from 0."""
    dash: int = 0
    """Index of the page's kinds of line, from 0, the solid one."""
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
    """Plot a chart.

    Args:
        title: for readers who cannot see it.
        series: plotted in order.
        x: horizontal axis.
        y: vertical axis.
        width: pixels at which the text has its size.
        height: pixels.
        references: horizontal lines.
    """
    frame = _Frame.around(x, y, series, width, height)
    parts = [tag("title", title), *_grid(frame)]
    for reference in references:
        level = frame.place_y(reference.y)
        parts.append(tag("line", x1=frame.left, x2=frame.right, y1=level, y2=level, class_="reference"))
    for one in series:
        parts.append(_draw_series(one, frame))
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width} {height}",
        role="img",
        class_="chart",
        xmlns="http://www.w3.org/2000/svg",
        font_size=FONT_SIZE,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """Where the plot lies in the picture, pixels."""

    x: Axis
    y: Axis
    left: float
    right: float
    bottom: float
    slots: Mapping[float, float]
    """SLOT at each x of a point, less where neighbours would collide."""

    @classmethod
    def around(cls, x: Axis, y: Axis, series: Sequence[Series], width: int, height: int) -> _Frame:
        """Leave as much room as the marks' texts need."""
        left = max(LEFT, round(max((len(text) for _, text in y.ticks), default=0) * CHARACTER) + 10)
        right = width - max(RIGHT, round(len(x.ticks[-1][1]) * CHARACTER / 2) + 2)
        slots = _slots([point for one in series for point in one.points], x, right - left)
        return cls(x=x, y=y, left=left, right=right, bottom=height - BOTTOM, slots=slots)

    def place_x(self, value: float) -> float:
        return round(self.left + self.x.share(value) * (self.right - self.left), 1)

    def place_y(self, value: float) -> float:
        return round(TOP + (1 - self.y.share(value)) * (self.bottom - TOP), 1)


def _slots(points: Sequence[Point], axis: Axis, length: float) -> dict[float, float]:
    """Return how far apart, in pixels, points are put that share an x."""
    places: dict[float, float] = {}
    for point in points:
        places[point.x] = max(places.get(point.x, 1), 2 * abs(point.shift) + 1)
    values = sorted(places, key=axis.share)  # from the left, also on an axis that falls
    spots = [length * axis.share(value) for value in values]
    around = [-spots[0], *spots, 2 * length - spots[-1]] if spots else []  # the axis's ends are half a gap away
    gaps = [min(b - a, c - b) for a, b, c in zip(around, around[1:], around[2:], strict=False)]
    return {value: min(SLOT, gap / places[value]) for value, gap in zip(values, gaps, strict=True)}


def _grid(frame: _Frame) -> list[Markup]:
    left, right, bottom = frame.left, frame.right, frame.bottom
    parts = []
    taken = math.inf  # what the mark before reaches to; one that would touch it has no text
    for value, text in frame.y.ticks:
        level = frame.place_y(value)
        parts.append(tag("line", x1=left, x2=right, y1=level, y2=level, class_="grid"))
        if level + FONT_SIZE <= taken:
            parts.append(tag("text", text, x=left - 8, y=level + 4, text_anchor="end", class_="tick"))
            taken = level
    taken = -math.inf
    for value, text in frame.x.ticks:
        column, half = frame.place_x(value), len(text) * CHARACTER / 2
        parts.append(tag("line", x1=column, x2=column, y1=bottom, y2=bottom + 5, class_="grid"))
        if column - half >= taken:
            parts.append(tag("text", text, x=column, y=bottom + 18, text_anchor="middle", class_="tick"))
            taken = column + half + 3
    parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    middle, low = (left + right) / 2, bottom + BOTTOM - 4
    parts.append(tag("text", frame.x.label, x=middle, y=low, text_anchor="middle", class_="note"))
    return parts


def _draw_series(series: Series, frame: _Frame) -> Markup:
    spots = [
        (round(frame.place_x(point.x) + point.shift * frame.slots[point.x], 1), frame.place_y(point.y))
        for point in series.points
    ]
    parts = [
        tag("polyline", points=" ".join(f"{a},{b}" for a, b in stretch), class_="line")
        for stretch in _stretches(series.points, spots)
    ]
    for point, (column, level) in zip(series.points, spots, strict=True):
        if point.low is not None and point.high is not None:
            low, high = frame.place_y(point.low), frame.place_y(point.high)
            parts.append(tag("line", x1=column, x2=column, y1=low, y2=high, class_="whisker"))
        if series.markers:
            parts.append(tag("circle", tag("title", point.note), cx=column, cy=level, r=4.5, class_="marker"))
    return tag("g", *parts, class_=_style(series))


def _stretches(points: Sequence[Point], spots: Sequence[Spot]) -> list[list[Spot]]:
    """Cut a line where a series has several points at an x: which of them would it pass?"""
    counts = Counter(point.x for point in points)
    stretches: list[list[Spot]] = [[]]
    for point, spot in zip(points, spots, strict=True):
        if counts[point.x] == 1:
            stretches[-1].append(spot)
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if len(stretch) > 1]


def _style(series: Series) -> str:
    return f"series c{series.color} d{series.dash}"


def legend(series: Sequence[Series], references: Sequence[Reference] = ()) -> Markup:
    """Return the names of series and reference lines beside their colours."""
    return tag(
        "ul",
        *(tag("li", _swatch(one), one.label) for one in series),
        *(tag("li", tag("i", class_="swatch dashed"), one.label) for one in references),
        class_="legend",
    )


def _swatch(series: Series) -> Markup:
    return tag(
        "svg",
        tag("line", x1=0, x2=26, y1=6, y2=6, class_="line"),
        tag("circle", cx=13, cy=6, r=4.5, class_="marker") if series.markers else None,
        viewBox="0 0 26 12",
        width=26,
        height=12,
        aria_hidden="true",
        class_=f"swatch {_style(series)}",
    )


def all_widths(plot: Callable[[int, int], Markup]) -> Markup:
    """Plot a chart for a wide, a middling and a narrow screen; the page's style shows one of them.

    Args:
        plot: takes width and height in pixels.
    """
    return join(
        tag("div", plot(1000, 360), class_="only-wide"),
        tag("div", plot(560, 310), class_="only-middle"),
        tag("div", plot(340, 270), class_="only-narrow"),
    )
