"""The table of a comparison: kinds of students at each number of phases, against the first kind, seeds pooled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.students import Kid, load_kid, load_scores, pool, ratio
from common.errors import DataError
from common.files import canonical_json, write_bytes_atomic
from stage2_student.evaluation.metrics import Estimate, Grouped, estimate, paired_difference
from stage2_student.report.charts import Axis, Point, Series, all_widths, legend, line_chart
from stage2_student.report.markup import Markup, join, tag
from stage2_student.report.parts import document, section
from stage2_student.report.plots import axis_from_zero, log_ticks, look
from stage2_student.report.tables import table

_ROOM = 1.4
"""Factor that the logarithmic axis below a chart reaches beyond its points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Students that differ by their seed alone."""

    name: str
    phases: int
    facts: Mapping[str, str]
    """What the table says of them besides their scores, by column; all kinds have the same columns."""
    labels: Sequence[str]
    """What the evaluation calls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a kind scored, the seeds pooled, with intervals over layouts."""

    name: str
    phases: int
    facts: Mapping[str, str]
    error: Estimate
    """Endpoint error."""
    of_seeds: tuple[float, ...]
    """Endpoint error of each seed."""
    sen_acc: Estimate | None
    color_acc: Estimate | None
    kid: Estimate | None
    """To the true images."""
    against: Differences
    """Paired differences to the first kind of as many phases; none for that one itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """Of a kind to another one, on the same layouts; None where there is nothing to compare."""

    error_ratio: Estimate | None = None
    sen_acc: Estimate | None = None
    color_acc: Estimate | None = None
    kid: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    scores: Mapping[str, Grouped]
    kid: Kid | None

    def against(self, other: _Found) -> Differences:
        return Differences(
            error_ratio=ratio(self.scores["endpoint_error"], other.scores["endpoint_error"]),
            sen_acc=paired_difference(self.scores["sen_acc"], other.scores["sen_acc"], 0),
            color_acc=paired_difference(self.scores["color_acc"], other.scores["color_acc"], 0),
            kid=self.kid.less(other.kid) if self.kid and other.kid else None,
        )


def make_rows(evaluation: Path, kinds: Sequence[Kind]) -> list[Row]:
    """Compute the table.

    Args:
        evaluation: folder of the evaluation that all students were measured in.
        kinds: the first of a number of phases is what the others of it are compared with.

    Raises:
        DataError: runs were not measured against the teacher's own solves, or on different layouts.
    """
    rows: list[Row] = []
    firsts: dict[int, _Found] = {}
    for kind in kinds:
        seeds = [load_scores(evaluation, label) for label in kind.labels]
        scores = {name: pool([of_seed[name] for of_seed in seeds]) for name in seeds[0]}
        found = _Found(scores=scores, kid=load_kid(evaluation, kind.labels))
        first = firsts.setdefault(kind.phases, found)
        rows.append(
            Row(
                name=kind.name,
                phases=kind.phases,
                facts=kind.facts,
                error=_error(evaluation, found.scores),
                of_seeds=tuple(_error(evaluation, of_seed).value for of_seed in seeds),
                sen_acc=estimate(found.scores["sen_acc"], 0),
                color_acc=estimate(found.scores["color_acc"], 0),
                kid=found.kid.estimate if found.kid else None,
                against=Differences() if first is found else found.against(first),
            )
        )
    return rows


def _error(evaluation: Path, scores: Mapping[str, Grouped]) -> Estimate:
    found = estimate(scores["endpoint_error"], 0)
    if found is None:
        raise DataError(
            f"{evaluation}: its runs were not measured against the teacher's own solves, expected so; evaluate in"
            " another folder, without evaluate.endpoint_error = false"
        )
    return found


def describe_solve(evaluation: Path, steps: int) -> str:
    """Say how the teacher's own solve of so many steps scored, which the students are measured against."""
    label = f"teacher, {steps} steps (as recorded)"
    scores, kid = load_scores(evaluation, label), load_kid(evaluation, [label])
    text, color = (_plain(estimate(scores[name], 0), 100, 1) for name in ("sen_acc", "color_acc"))
    return (
        f"the solve itself: Sen. Acc {text} %, colour {color} %, KID {_plain(kid.estimate if kid else None, 1, 4)}"
    )


# As text and as a page.


def cells(row: Row) -> dict[str, str]:
    """Return a row in words, by column."""
    less = row.against
    return {
        "": row.name,
        "phases": f"{row.phases}",
        **row.facts,
        "error": _plain(row.error, 1, 4),
        "of seeds": f"{min(row.of_seeds):.4f} to {max(row.of_seeds):.4f}" if len(row.of_seeds) > 1 else "",
        "error, % more": _signed(less.error_ratio, 100, 1, 1),
        "Sen. Acc, %": _plain(row.sen_acc, 100, 1),
        "Sen. Acc, points": _signed(less.sen_acc, 100, 1),
        "colour, %": _plain(row.color_acc, 100, 1),
        "colour, points": _signed(less.color_acc, 100, 1),
        "KID": _plain(row.kid, 1, 4),
        "KID, more": _signed(less.kid, 1, 4),
    }


def _plain(found: Estimate | None, factor: float, digits: int) -> str:
    return "-" if found is None else f"{factor * found.value:.{digits}f}"


def _signed(found: Estimate | None, factor: float, digits: int, zero: float = 0) -> str:
    """Write how far a difference, or a ratio, is from none (`zero`), with its interval."""
    if found is None:
        return ""
    value, low, high = (f"{factor * (x - zero):+.{digits}f}" for x in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def format_rows(rows: Sequence[Row]) -> str:
    """Lay the table out for a terminal."""
    found = [cells(row) for row in rows]
    lines = [tuple(found[0]), *(tuple(line.values()) for line in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Along:
    """What scores are plotted against, on a logarithmic axis."""

    name: str = "UNet calls"
    place: Callable[[Row], int] = lambda row: row.phases
    """A row's place."""


def write_page(
    out: Path, name: str, title: str, measured: str, rows: Sequence[Row], along: Along | None = None
) -> None:
    """Write OUT/NAME.html, with charts and the table, and the figures as OUT/NAME.json.

    Args:
        out: folder.
        name: of the files.
        title: the page's heading.
        measured: on what, for the table.
        rows: at least one.
        along: what is plotted against; None for the student's UNet calls.
    """
    along = along or Along()
    intro = "Distance of the final latents from the teacher's own solve, the seeds pooled, with 95 % intervals."
    looks = "Distance between the distributions of the images and of the true ones, likewise; lower is better."
    found = [cells(row) for row in rows]
    columns = list(found[0])[2:]
    split = columns.index("Sen. Acc, %")
    parts = (
        section("Endpoint error", intro, join(_error_chart(rows, along), _table(found, columns[:split]))),
        section("KID", looks, _kid_chart(rows, along)),
        section("Text, colours, KID", measured, _table(found, columns[split:])),
    )
    page = document(title, tag("header", tag("h1", title)), tag("main", *filter(None, parts)))
    write_bytes_atomic(out / f"{name}.html", page.encode())
    write_bytes_atomic(out / f"{name}.json", canonical_json([dataclasses.asdict(row) for row in rows]))


def _table(found: Sequence[Mapping[str, str]], columns: Sequence[str]) -> Markup:
    """Lay out some columns, after name and phases."""
    head = ["", "phases", *columns]
    return table(head, [(line[""], [line[column] for column in head[1:]], "") for line in found])


def _error_chart(rows: Sequence[Row], along: Along) -> Markup:
    low, high = min(row.error.low for row in rows) / 1.1, max(row.error.high for row in rows) * 1.1
    y = Axis(label="", low=low, high=high, ticks=log_ticks(low, high), logarithmic=True)
    return _chart("Endpoint error", rows, along, y, [row.error for row in rows])


def _kid_chart(rows: Sequence[Row], along: Along) -> Markup | None:
    """Plot KID from 0 on; None if it was not measured."""
    found = [row.kid for row in rows if row.kid is not None]
    if len(found) < len(rows):
        return None
    y = axis_from_zero(max(kid.high for kid in found))
    return _chart("KID", rows, along, y, [replace(kid, low=max(kid.low, 0.0)) for kid in found])


def _chart(title: str, rows: Sequence[Row], along: Along, y: Axis, values: Sequence[Estimate]) -> Markup:
    """Plot a value of each row, with its interval; a curve for each kind."""
    names = list(dict.fromkeys(row.name for row in rows))
    series = []
    for index, name in enumerate(names):
        of_kind = sorted(
            ((along.place(row), value) for row, value in zip(rows, values, strict=True) if row.name == name),
            key=lambda pair: pair[0],
        )
        color, dash = look(index)
        aside = index - (len(names) - 1) / 2
        points = tuple(
            Point(
                x=place,
                y=value.value,
                low=value.low,
                high=value.high,
                note=f"{name}, {place} {along.name}: {value.value:.4f}",
                shift=aside,
            )
            for place, value in of_kind
        )
        series.append(Series(label=name, points=points, color=color, dash=dash))
    places = sorted({along.place(row) for row in rows})
    ticks = tuple((float(place), f"{place}") for place in places)
    x = Axis(label=along.name, low=places[0] / _ROOM, high=places[-1] * _ROOM, ticks=ticks, logarithmic=True)

    def plot(width: int, height: int) -> Markup:
        return line_chart(f"{title} against {along.name}", series, x, y, width=width, height=height)

    return join(legend(series), all_widths(plot))
