"""The report's tables; on a narrow screen each row becomes a card, by the labels that its cells carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stage2_student.report.markup import Child, Markup, tag
from stage2_student.report.words import evaluations, interval, percent, points, seconds

Run = Mapping[str, Any]


def runs_table(runs: Sequence[Run]) -> Markup:
    """Lay out what every run scored and cost."""
    colors = any(run["color_acc"] for run in runs)
    head = ["", "Sen. Acc", "ignoring case, spaces", "NED", *(["colour"] if colors else [])]
    extras = [
        (key, name) for key, name in (("fid", "FID"), ("clip_score", "CLIP score")) if any(key in r for r in runs)
    ]
    head += [name for _, name in extras]
    head += ["UNet calls", "WriteNet calls", "time per image"]
    rows = []
    for run in runs:
        cells: list[Child] = [
            _bar(run["sen_acc"]),
            percent(run["sen_acc_folded"]),
            _score(run["ned"]),
            *([percent(run["color_acc"])] if colors else []),
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


def _kind(run: Run) -> str:
    return "ablation" if run["settings"].get("without") else str(run["kind"])


def _height(low: float, high: float) -> str:
    return f"{low:g} px and more" if not high else f"up to {high:g} px" if not low else f"{low:g} to {high:g} px"


def differences_table(differences: Sequence[Mapping[str, Any]]) -> Markup:
    """Lay out paired differences."""
    rows = []
    for row in differences:
        accuracy = row["sen_acc"]
        certain = accuracy is not None and (accuracy["low"] > 0 or accuracy["high"] < 0)
        sign = "" if not certain else "better" if accuracy["value"] > 0 else "worse"
        cells: list[Child] = [
            tag("span", points(accuracy), class_=f"difference {sign}"),
            interval(accuracy),
            points(row["ned"]),
            "yes" if certain else "no",
        ]
        rows.append((f"{row['run']} − {row['less']}", cells, ""))
    return _table(["", "Sen. Acc, points", "95 % interval", "NED, points", "beyond chance"], rows)


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


def _score(estimate: Mapping[str, Any] | None) -> Child:
    return "–" if estimate is None else tag("span", f"{estimate['value']:.3f}", title=_ends(estimate))


def _ends(estimate: Mapping[str, Any]) -> str:
    return f"{estimate['low']:.3f} to {estimate['high']:.3f}"
