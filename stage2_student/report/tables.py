"""The report's tables; on a narrow screen each row becomes a card, by the labels that its cells carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stage2_student.evaluation.metrics import Estimate
from stage2_student.evaluation.table import Difference, RunRow
from stage2_student.report.markup import Child, Markup, tag
from stage2_student.report.words import evaluations, interval, percent, points, seconds, verdict


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
    _Measure(key="endpoint_error", head="endpoint error", factor=1, digits=3, less_is_better=True),
    _Measure(key="psnr", head="PSNR, dB", factor=1, digits=1),
)


def runs_table(runs: Sequence[RunRow]) -> Markup:
    """Lay out what every run scored and cost; colour, ground, KID, FID, CLIP score where any run has them."""
    colors, grounds, kids = (any(getattr(run, key) for run in runs) for key in ("color_acc", "ground", "kid"))
    extras = [
        (key, name)
        for key, name in (("fid", "FID"), ("clip_score", "CLIP score"))
        if any(getattr(run, key) is not None for run in runs)
    ]
    head = ["", "Sen. Acc", "ignoring case, spaces", "NED"]
    head += [*(["colour"] if colors else []), *(["ground ΔE"] if grounds else [])]
    head += [*(["KID"] if kids else []), *(name for _, name in extras)]
    head += ["UNet calls", "WriteNet calls", "time per image"]
    rows = []
    for run in runs:
        cells: list[Child] = [
            bar(run.sen_acc),
            percent(run.sen_acc_folded),
            figure(run.ned, 1, 3),
            *([figure(run.color_acc, 100, 1, "\u00a0%")] if colors else []),
            *([figure(run.ground, 1, 2)] if grounds else []),
            *([figure(run.kid, 1, 3)] if kids else []),
            *("–" if (value := getattr(run, key)) is None else f"{value:.2f}" for key, _ in extras),
            evaluations(run.unet_evaluations),
            evaluations(run.writenet_evaluations),
            seconds(run.seconds_per_image),
        ]
        rows.append((run.label, cells, _kind(run)))
    return table(head, rows)


def distances_table(runs: Sequence[RunRow]) -> Markup | None:
    """Lay out how far every run is from the teacher's own solve, and at what cost; None if none was measured."""
    if not any(run.endpoint_error for run in runs):
        return None
    head = ["", "endpoint error", "inside boxes", "outside", "PSNR, dB", "UNet calls"]
    rows = [
        (
            run.label,
            [
                _error(run.endpoint_error),
                _error(run.endpoint_error_inside),
                _error(run.endpoint_error_outside),
                figure(run.psnr, 1, 1),
                evaluations(run.unet_evaluations),
            ],
            _kind(run),
        )
        for run in runs
    ]
    return table(head, rows)


def heights_table(runs: Sequence[RunRow]) -> Markup | None:
    """Lay out Sen. Acc by the height of the text; None if all lines are of one class."""
    found = [{(row.from_, row.to): row.sen_acc for row in run.by_height} for run in runs]
    classes = sorted({key for of_run in found for key in of_run})
    return _split_table(runs, found, {key: _height(*key) for key in classes}) if len(classes) > 1 else None


def map_table(runs: Sequence[RunRow]) -> Markup | None:
    """Lay out Sen. Acc of the lines in the glyph map and of those out of it; None if it shows all."""
    found = [{row.in_glyph_map: row.sen_acc for row in run.by_map} for run in runs]
    classes = {key for of_run in found for key in of_run}
    names = {key: name for key, name in {True: "in the map", False: "out of it"}.items() if key in classes}
    return _split_table(runs, found, names) if False in classes else None


def _split_table(
    runs: Sequence[RunRow], found: Sequence[Mapping[Any, Estimate]], names: Mapping[Any, str]
) -> Markup:
    """Lay out an accuracy of each run's lines by their class: one column for each of `names`."""
    counts = {key: accuracy.count for of_run in found for key, accuracy in of_run.items()}
    rows = [
        (run.label, [bar(of_run.get(key), brief=True) for key in names], _kind(run))
        for run, of_run in zip(runs, found, strict=True)
    ]
    return table(["", *(f"{name}, {counts[key]} lines" for key, name in names.items())], rows, "dense")


def _kind(run: RunRow) -> str:
    return "ablation" if run.is_ablation else run.kind


def _height(low: float, high: float) -> str:
    return f"{low:g} px and more" if not high else f"up to {high:g} px" if not low else f"{low:g} to {high:g} px"


def differences_table(differences: Sequence[Difference]) -> Markup:
    """Lay out paired differences; each says for itself whether it is beyond chance, and which way."""
    shown = [
        measure
        for measure in _MEASURES
        if measure.key in ("sen_acc", "ned") or any(getattr(row, measure.key) for row in differences)
    ]
    rows = [
        (f"{row.run} − {row.less}", [_difference(getattr(row, measure.key), measure) for measure in shown], "")
        for row in differences
    ]
    return table(["", *(measure.head for measure in shown)], rows, "pairs")


def _difference(estimate: Estimate | None, measure: _Measure) -> Child:
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


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[Child], str]], style: str = "") -> Markup:
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


def bar(estimate: Estimate | None, brief: bool = False) -> Child:
    """Show an accuracy as a number over a bar with its interval; brief leaves the interval's numbers to a hint."""
    if estimate is None:
        return "–"
    low, high, value = (f"{100 * share:.2f}%" for share in (estimate.low, estimate.high, estimate.value))
    return tag(
        "span",
        tag("b", percent(estimate)),
        None if brief else tag("small", interval(estimate)),
        tag("i", tag("i", class_="reach"), class_="bar"),
        class_="score brief" if brief else "score",
        title=interval(estimate),
        style=f"--low:{low};--high:{high};--value:{value}",
    )


def _error(estimate: Estimate | None) -> Child:
    """Show an endpoint error; latents are of a size of about 1, so that large ones need no small digits."""
    return figure(estimate, 1, 3 if estimate is None or estimate.high < 10 else 1)


def figure(estimate: Estimate | None, factor: float, digits: int, unit: str = "") -> Child:
    """Show a number over its interval."""
    if estimate is None:
        return "–"
    value = f"{factor * estimate.value:.{digits}f}{unit}"
    return tag("span", value, tag("small", interval(estimate, factor, digits)), class_="figure")
