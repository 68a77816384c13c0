"""The report's tables; on a narrow screen each row becomes a card, by the labels that its cells carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stage2_student.report.markup import Child, Markup, tag
from stage2_student.report.words import evaluations, interval, percent, points, seconds, verdict

Run = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measure:
    """What two runs are compared by."""

    key: str
    head: str
    factor: float = 100
    digits: int = 1
    less_is_better: bool = False


_MEASURES = (
    _Measure(key="sen_acc", head="Sen. Acc, points"),
    _Measure(key="ned", head="NED, points"),
    _Measure(key="color_acc", head="colour, points"),
    _Measure(key="ground", head="ground ΔE", factor=1, digits=2, less_is_better=True),
)


def runs_table(runs: Sequence[Run]) -> Markup:
    """Lay out what every run scored and cost; colour, ground, FID and CLIP score where any run has them."""
    colors, grounds = (any(run.get(key) for run in runs) for key in ("color_acc", "ground"))
    extras = [
        (key, name) for key, name in (("fid", "FID"), ("clip_score", "CLIP score")) if any(key in r for r in runs)
    ]
    head = ["", "Sen. Acc", "ignoring case, spaces", "NED"]
    head += [*(["colour"] if colors else []), *(["ground ΔE"] if grounds else []), *(name for _, name in extras)]
    head += ["UNet calls", "WriteNet calls", "time per image"]
    rows = []
    for run in runs:
        cells: list[Child] = [
            _bar(run["sen_acc"]),
            percent(run["sen_acc_folded"]),
            _figure(run["ned"], 1, 3),
            *([_figure(run.get("color_acc"), 100, 1, "\u00a0%")] if colors else []),
            *([_figure(run.get("ground"), 1, 2)] if grounds else []),
            *(f"{run[key]:.2f}" if key in run else "–" for key, _ in extras),
            evaluations(run["unet_evaluations"]),
            evaluations(run["writenet_evaluations"]),
            seconds(run["seconds_per_image"]),
        ]
        rows.append((run["label"], cells, _kind(run)))
    return _table(head, rows)


def heights_table(runs: Sequence[Run]) -> Markup | None:
    """Lay out Sen. Acc by the height of the text; None if all lines are of one class."""
    classes = sorted({(row["from"], row["to"]) for run in runs for row in run["by_height"]})
    if len(classes) < 2:
        return None
    counts = {(row["from"], row["to"]): row["sen_acc"]["count"] for run in runs for row in run["by_height"]}
    head = ["", *(f"{_height(low, high)}, {counts[low, high]} lines" for low, high in classes)]
    rows = []
    for run in runs:
        found = {(row["from"], row["to"]): row["sen_acc"] for row in run["by_height"]}
        rows.append((run["label"], [_bar(found.get(key), brief=True) for key in classes], _kind(run)))
    return _table(head, rows, "dense")


def map_table(runs: Sequence[Run]) -> Markup | None:
    """Lay out Sen. Acc of the lines in the glyph map and of those out of it; None if it shows all."""
    names = {True: "in the map", False: "out of it"}
    # Summaries of earlier versions do not say it.
    found = [{row["in_glyph_map"]: row["sen_acc"] for row in run.get("by_map", [])} for run in runs]
    counts = {shown: accuracy["count"] for row in found for shown, accuracy in row.items()}
    if False not in counts:
        return None
    shown = sorted(counts, reverse=True)
    rows = [
        (run["label"], [_bar(row.get(key), brief=True) for key in shown], _kind(run))
        for run, row in zip(runs, found, strict=True)
    ]
    return _table(["", *(f"{names[key]}, {counts[key]} lines" for key in shown)], rows, "dense")


def _kind(run: Run) -> str:
    return "ablation" if run["settings"].get("without") else str(run["kind"])


def _height(low: float, high: float) -> str:
    return f"{low:g} px and more" if not high else f"up to {high:g} px" if not low else f"{low:g} to {high:g} px"


def differences_table(differences: Sequence[Mapping[str, Any]]) -> Markup:
    """Lay out paired differences; each says for itself whether it is beyond chance, and which way."""
    shown = [
        measure
        for measure in _MEASURES
        if measure.key in ("sen_acc", "ned") or any(row.get(measure.key) for row in differences)
    ]
    rows = [
        (f"{row['run']} − {row['less']}", [_difference(row.get(measure.key), measure) for measure in shown], "")
        for row in differences
    ]
    return _table(["", *(measure.head for measure in shown)], rows, "pairs")


def _difference(estimate: Mapping[str, Any] | None, measure: _Measure) -> Child:
    if estimate is None:
        return "–"
    found = verdict(estimate, measure.less_is_better)
    return tag(
        "span",
        tag("b", points(estimate, measure.factor, measure.digits)),
        tag("em", found) if found else None,
        tag("small", interval(estimate, measure.factor, measure.digits)),
        class_=f"difference {found}".rstrip(),
    )


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[Child], str]], style: str = "") -> Markup:
    """Lay out rows of (name, cells, class)."""
    body = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(tag("td", cell, data_label=label) for label, cell in zip(head[1:], cells, strict=True)),
            class_=kind or None,
        )
        for name, cells, kind in rows
    ]
    header = tag("thead", tag("tr", *(tag("th", label, scope="col") for label in head)))
    return tag("table", header, tag("tbody", *body), class_=style or None)


def _bar(estimate: Mapping[str, Any] | None, brief: bool = False) -> Child:
    """Show an accuracy as a number over a bar with its interval; brief leaves the interval's numbers to a hint."""
    if estimate is None:
        return "–"
    low, high, value = (f"{100 * estimate[key]:.2f}%" for key in ("low", "high", "value"))
    return tag(
        "span",
        tag("b", percent(estimate)),
        None if brief else tag("small", interval(estimate)),
        tag("i", tag("i", class_="reach"), class_="bar"),
        class_="score brief" if brief else "score",
        title=interval(estimate),
        style=f"--low:{low};--high:{high};--value:{value}",
    )


def _figure(estimate: Mapping[str, Any] | None, factor: float, digits: int, unit: str = "") -> Child:
    """Show a number over its interval."""
    if estimate is None:
        return "–"
    value = f"{factor * estimate['value']:.{digits}f}{unit}"
    return tag("span", value, tag("small", interval(estimate, factor, digits)), class_="figure")
