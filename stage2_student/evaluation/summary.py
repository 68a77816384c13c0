"""From single results to the table: accuracies with intervals, by text height, costs, and paired differences."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files import canonical_json, write_bytes_atomic
from stage2_student.evaluation.layouts import Color, palette_of
from stage2_student.evaluation.metrics import Estimate, Grouped, estimate, fold, ned, paired_difference
from stage2_student.evaluation.reading import LineResult, color_right
from stage2_student.evaluation.results import (
    RESULTS_FILE,
    RUN_FILE,
    ImageResult,
    load_layouts,
    load_results,
    read_description,
)

SUMMARY_FILE = "evaluation.json"
QUALITY_FILE = "quality.json"
"""Of a run, where FID or CLIP score were asked for."""
HEIGHT_EDGES = (0, 12, 16, 20, 24, 32, 48, 64, 96)
"""Pixels: lower edges of the classes of text height; the last is open."""

Score = Callable[[LineResult], float | None]
"""A line's score, None if the line has none."""


def summarise(folder: Path, bootstrap_seed: int = 0) -> dict[str, Any]:
    """Compute the table of an evaluation's folder and write it to `evaluation.json`.

    Runs that are not complete (stopped midway) are left out and named.

    Args:
        folder: of the evaluation.
        bootstrap_seed: keys the resampling.

    Returns:
        What was written: settings, runs (each with sen_acc, sen_acc_folded, ned, color_acc, ground, by_height,
        by_map and costs; fid and clip_score where measured), and the paired differences of all pairs of runs.

    Raises:
        DataError: the folder is not an evaluation's, or holds no complete run.
    """
    layouts, settings = load_layouts(folder)
    palette = palette_of(layouts)
    expected = {
        (layout.layout_id, sample) for layout in layouts for sample in range(settings["samples_per_layout"])
    }
    runs: list[dict[str, Any]] = []
    results: dict[str, list[ImageResult]] = {}
    incomplete = []
    for place in sorted((folder / "runs").glob(f"*/{RUN_FILE}")):
        description = read_description(place)
        found = {(r.layout_id, r.sample): r for r in load_results(place.with_name(RESULTS_FILE))}
        if found.keys() != expected:
            incomplete.append(description["label"])
            continue
        of_run = results[description["label"]] = [found[key] for key in sorted(expected)]
        row = _summarise_run(description, of_run, palette, bootstrap_seed)
        runs.append({"folder": place.parent.name, **row, **_quality(place.with_name(QUALITY_FILE))})
    if not runs:
        raise DataError(f"{folder}: no run is complete (begun: {incomplete}); run evaluate again to go on")
    runs.sort(key=_rank)
    summary = {
        "settings": settings,
        "layouts": len(layouts),
        "lines": sum(len(layout.lines) for layout in layouts) * settings["samples_per_layout"],
        "palette": [list(color) for color in palette],
        "runs": runs,
        "incomplete": incomplete,
        "differences": _differences([run["label"] for run in runs], results, palette, bootstrap_seed),
    }
    write_bytes_atomic(folder / SUMMARY_FILE, canonical_json(summary))
    return summary


def _rank(run: dict[str, Any]) -> tuple[bool, int, int, str]:
    """Order of the table: ceilings, teacher, students, many steps first; what leaves a part out comes last."""
    kinds = ("truth", "vae", "images", "teacher", "student")
    kind = kinds.index(run["kind"]) if run["kind"] in kinds else len(kinds)
    return bool(run["settings"].get("without")), kind, -run["steps"], run["label"]


def _summarise_run(
    description: dict[str, Any], results: Sequence[ImageResult], palette: Sequence[Color], seed: int
) -> dict[str, Any]:
    return {
        "label": description["label"],
        "kind": description["kind"],
        "steps": description["steps"],
        "settings": description["settings"],
        "images": len(results),
        "sen_acc_folded": _as_dict(estimate(_group(results, folded_score), seed)),
        **{name: _as_dict(estimate(group, seed)) for name, group in _measures(results, palette).items()},
        "by_height": _by_height(results, seed),
        "by_map": _by_map(results, seed),
        "unet_evaluations": statistics.fmean(result.unet_evaluations for result in results),
        "writenet_evaluations": statistics.fmean(result.writenet_evaluations for result in results),
        # The median: a machine that is shared for a while should not decide.
        "seconds_per_image": statistics.median(result.seconds for result in results),
    }


def _measures(results: Sequence[ImageResult], palette: Sequence[Color]) -> dict[str, Grouped]:
    """Return what runs are compared by; `ground` is of images, all others of lines."""
    grounds = [(result.layout_id, result.ground) for result in results]
    return {
        "sen_acc": _group(results, exact_score),
        "ned": _group(results, ned_score),
        "color_acc": _group(results, lambda line: _optional(color_right(line, palette))),
        "ground": _without_none(grounds),
    }


def exact_score(line: LineResult) -> float:
    """Sen. Acc: 1 if the line was read exactly as asked for."""
    return float(line.exact)


def folded_score(line: LineResult) -> float:
    """1 if the line was read as asked for but for case and spaces."""
    return float(fold(line.text) == fold(line.read))


def ned_score(line: LineResult) -> float:
    """NED of the line."""
    return ned(line.text, line.read)


def _quality(path: Path) -> dict[str, Any]:
    """Return FID and CLIP score if they were measured."""
    quality = read_description(path) if path.exists() else {}
    return {name: quality[name] for name in ("fid", "clip_score") if name in quality}


def _optional(value: bool | None) -> float | None:
    return None if value is None else float(value)


def _group(results: Sequence[ImageResult], score: Score) -> Grouped:
    return _without_none([(name, score(line)) for name, line in _lines(results)])


def _without_none(scored: Sequence[tuple[str, float | None]]) -> Grouped:
    kept = [(layout_id, value) for layout_id, value in scored if value is not None]
    return Grouped.of([layout_id for layout_id, _ in kept], [value for _, value in kept])


def _by_height(results: Sequence[ImageResult], seed: int) -> list[dict[str, Any]]:
    """Return one entry per class of text height that has lines, `to` 0 for the open one."""
    rows = []
    for low, high in itertools.pairwise([*HEIGHT_EDGES, float("inf")]):
        lines = [(name, line) for name, line in _lines(results) if low <= line.height < high]
        if lines:
            rows.append({"from": low, "to": 0 if high == float("inf") else high, **_accuracies(lines, seed)})
    return rows


def _by_map(results: Sequence[ImageResult], seed: int) -> list[dict[str, Any]]:
    """Return an entry for the lines that the glyph map shows and one for the others, where there are any."""
    rows = []
    for shown in (True, False):
        lines = [(name, line) for name, line in _lines(results) if line.in_glyph_map == shown]
        if lines:
            rows.append({"in_glyph_map": shown, **_accuracies(lines, seed)})
    return rows


def _lines(results: Sequence[ImageResult]) -> list[tuple[str, LineResult]]:
    """Return all lines, each with its layout's id."""
    return [(result.layout_id, line) for result in results for line in result.lines]


def _accuracies(lines: Sequence[tuple[str, LineResult]], seed: int) -> dict[str, Any]:
    names = [name for name, _ in lines]
    scores = {"sen_acc": exact_score, "ned": ned_score}
    return {
        key: _as_dict(estimate(Grouped.of(names, [score(line) for _, line in lines]), seed))
        for key, score in scores.items()
    }


def _differences(
    labels: Sequence[str], results: dict[str, list[ImageResult]], palette: Sequence[Color], seed: int
) -> list[dict[str, Any]]:
    """Compare every pair of runs, the later of the table less the earlier."""
    measures = {label: _measures(results[label], palette) for label in labels}
    rows = []
    for a, b in itertools.combinations(labels, 2):
        row: dict[str, Any] = {"run": b, "less": a}
        for name, of_b in measures[b].items():
            of_a = measures[a][name]
            # Results from before the ground was measured have none.
            comparable = name != "ground" or of_a.layout_ids == of_b.layout_ids
            row[name] = _as_dict(paired_difference(of_b, of_a, seed)) if comparable else None
        rows.append(row)
    return rows


def _as_dict(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else dataclasses.asdict(value)


def format_table(summary: dict[str, Any]) -> str:
    """Lay the runs out as a table of plain text, intervals in brackets."""
    head = ("run", "Sen. Acc", "NED", "colour", "ground ΔE", "UNet", "WriteNet", "s/image")
    rows = [
        (
            run["label"],
            _with_interval(run["sen_acc"]),
            _with_interval(run["ned"]),
            _with_interval(run["color_acc"]),
            "-" if run["ground"] is None else f"{run['ground']['value']:.1f}",
            f"{run['unet_evaluations']:g}",
            f"{run['writenet_evaluations']:g}",
            f"{run['seconds_per_image']:.3g}",
        )
        for run in summary["runs"]
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    ]
    lines += [f"not complete, left out: {label}" for label in summary["incomplete"]]
    return "\n".join(line.rstrip() for line in lines)


def _with_interval(value: dict[str, Any] | None) -> str:
    return "-" if value is None else f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
