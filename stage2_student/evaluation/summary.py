"""From single results to the table: accuracies with intervals, by text height, costs, and paired differences."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files import canonical_json, write_bytes_atomic
from common.layouts import Color, palette_of
from stage2_student.evaluation.image_features import kernel_distances
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
from stage2_student.evaluation.table import Difference, HeightRow, MapRow, RunRow, Summary, WayRow

SUMMARY_FILE = "evaluation.json"
QUALITY_FILE = "quality.json"
"""Of a run, where FID or CLIP score were asked for."""
HEIGHT_EDGES = (0, 12, 16, 20, 24, 32, 48, 64, 96)
"""Pixels: lower edges of the classes of text height; the last is open."""

DISTANCES = ("endpoint_error", "endpoint_error_inside", "endpoint_error_outside", "psnr")
"""What is measured against the teacher's own solves, by the names of `RunRow` and `Difference`."""

Score = Callable[[LineResult], float | None]
"""A line's score, None if the line has none."""


def summarise(folder: Path, bootstrap_seed: int = 0) -> Summary:
    """Compute the table of an evaluation's folder and write it to `evaluation.json`.

    Runs that are not complete (stopped midway) are left out and named.

    Args:
        folder: of the evaluation.
        bootstrap_seed: keys the resampling.

    Returns:
        What was written.

    Raises:
        DataError: the folder is not an evaluation's, or holds no complete run.
    """
    layouts, settings = load_layouts(folder)
    palette = palette_of(layouts)
    expected = {
        (layout.layout_id, sample) for layout in layouts for sample in range(settings["samples_per_layout"])
    }
    runs: list[RunRow] = []
    results: dict[str, list[ImageResult]] = {}
    incomplete = []
    for place in sorted((folder / "runs").glob(f"*/{RUN_FILE}")):
        description = read_description(place)
        found = {(r.layout_id, r.sample): r for r in load_results(place.with_name(RESULTS_FILE))}
        if found.keys() != expected:
            incomplete.append(description["label"])
            continue
        of_run = results[description["label"]] = [found[key] for key in sorted(expected)]
        runs.append(summarise_run(place.parent, description, of_run, palette, bootstrap_seed))
    if not runs:
        raise DataError(f"{folder}: no run is complete (begun: {incomplete}); run evaluate again to go on")
    kids = kernel_distances(folder / "runs", runs, sorted(expected), bootstrap_seed)
    runs = sorted((replace(run, kid=kids.get(run.label)) for run in runs), key=_rank)
    summary = Summary(
        settings=settings,
        layouts=len(layouts),
        lines=sum(len(layout.lines) for layout in layouts) * settings["samples_per_layout"],
        palette=tuple(palette),
        runs=tuple(runs),
        incomplete=tuple(incomplete),
        differences=tuple(_differences([run.label for run in runs], results, palette, bootstrap_seed)),
    )
    write_bytes_atomic(folder / SUMMARY_FILE, canonical_json(summary.as_json()))
    return summary


def _rank(run: RunRow) -> tuple[bool, int, int, str]:
    """Order of the table: ceilings, teacher, students, many steps first; what leaves a part out comes last."""
    kinds = ("truth", "vae", "images", "teacher", "student")
    kind = kinds.index(run.kind) if run.kind in kinds else len(kinds)
    return run.is_ablation, kind, -run.steps, run.label


def summarise_run(
    place: Path, description: dict[str, Any], results: Sequence[ImageResult], palette: Sequence[Color], seed: int
) -> RunRow:
    """Compute what a run scored and cost.

    Args:
        place: of its results.
        description: what its `run.json` says.
        results: of all its images, at least one.
        palette: colours that lines asked for; empty to leave their accuracy out.
        seed: keys the resampling.
    """
    scores = {name: estimate(group, seed) for name, group in measures(results, palette).items()}
    return RunRow(
        folder=place.name,
        label=description["label"],
        kind=description["kind"],
        steps=description["steps"],
        settings=description["settings"],
        images=len(results),
        sen_acc=scores["sen_acc"],
        sen_acc_folded=estimate(_group(results, folded_score), seed),
        ned=scores["ned"],
        color_acc=scores["color_acc"],
        ground=scores["ground"],
        endpoint_error=scores["endpoint_error"],
        endpoint_error_inside=scores["endpoint_error_inside"],
        endpoint_error_outside=scores["endpoint_error_outside"],
        psnr=scores["psnr"],
        way=tuple(_way(results, seed)),
        by_height=tuple(_by_height(results, seed)),
        by_map=tuple(_by_map(results, seed)),
        unet_evaluations=statistics.fmean(result.unet_evaluations for result in results),
        writenet_evaluations=statistics.fmean(result.writenet_evaluations for result in results),
        seconds_per_image=statistics.median(result.seconds for result in results),
        **_quality(place / QUALITY_FILE),
    )


def measures(results: Sequence[ImageResult], palette: Sequence[Color]) -> dict[str, Grouped]:
    """Return what runs are compared by; accuracies are of lines, `ground` and distances of images.

    Args:
        results: of all images of a run.
        palette: colours that lines asked for; empty to leave their accuracy out.

    Returns:
        Scores by the names that `Difference` has for them.
    """
    grounds = [(result.layout_id, result.ground) for result in results]
    return {
        **_distances(results),
        "sen_acc": _group(results, exact_score),
        "ned": _group(results, ned_score),
        "color_acc": _group(results, lambda line: _optional(color_right(line, palette))),
        "ground": _without_none(grounds),
    }


def _distances(results: Sequence[ImageResult]) -> dict[str, Grouped]:
    measured = [(result.layout_id, result.distance) for result in results if result.distance is not None]
    squares: dict[str, list[tuple[str, float | None]]] = {
        "endpoint_error": [(name, distance.latents.whole) for name, distance in measured],
        "endpoint_error_inside": [(name, distance.latents.inside) for name, distance in measured],
        "endpoint_error_outside": [(name, distance.latents.outside) for name, distance in measured],
    }
    ratios = [(name, distance.psnr) for name, distance in measured]
    return {key: _without_none(values, root=True) for key, values in squares.items()} | {
        "psnr": _without_none(ratios)
    }


def _way(results: Sequence[ImageResult], seed: int) -> list[WayRow]:
    """Average the distances of states at each timestep that every image has."""
    squares: dict[int, list[tuple[str, float]]] = {}
    for result in results:
        for state in result.distance.way if result.distance is not None else ():
            squares.setdefault(state.timestep, []).append((result.layout_id, state.square))
    rows = []
    for timestep in sorted(squares, reverse=True):
        error = estimate(_without_none(squares[timestep], root=True), seed)
        if error is not None and error.count == len(results):
            rows.append(WayRow(timestep=timestep, error=error))
    return rows


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


def _without_none(scored: Sequence[tuple[str, float | None]], *, root: bool = False) -> Grouped:
    kept = [(layout_id, value) for layout_id, value in scored if value is not None]
    return Grouped.of([layout_id for layout_id, _ in kept], [value for _, value in kept], root=root)


def _by_height(results: Sequence[ImageResult], seed: int) -> list[HeightRow]:
    rows = []
    for low, high in itertools.pairwise([*HEIGHT_EDGES, math.inf]):
        lines = [(name, line) for name, line in _lines(results) if low <= line.height < high]
        if lines:
            to = 0 if high == math.inf else int(high)
            rows.append(HeightRow(from_=int(low), to=to, **_accuracies(lines, seed)))
    return rows


def _by_map(results: Sequence[ImageResult], seed: int) -> list[MapRow]:
    rows = []
    for shown in (True, False):
        lines = [(name, line) for name, line in _lines(results) if line.in_glyph_map == shown]
        if lines:
            rows.append(MapRow(in_glyph_map=shown, **_accuracies(lines, seed)))
    return rows


def _lines(results: Sequence[ImageResult]) -> list[tuple[str, LineResult]]:
    """Return all lines, each with its layout's id."""
    return [(result.layout_id, line) for result in results for line in result.lines]


def _accuracies(lines: Sequence[tuple[str, LineResult]], seed: int) -> dict[str, Estimate]:
    names = [name for name, _ in lines]
    scores = {"sen_acc": exact_score, "ned": ned_score}
    found = {
        key: estimate(Grouped.of(names, [score(line) for _, line in lines]), seed) for key, score in scores.items()
    }
    return {key: value for key, value in found.items() if value is not None}  # none is: there are lines


def _differences(
    labels: Sequence[str], results: dict[str, list[ImageResult]], palette: Sequence[Color], seed: int
) -> list[Difference]:
    found = {label: measures(results[label], palette) for label in labels}
    rows = []
    for a, b in itertools.combinations(labels, 2):
        row: dict[str, Estimate | None] = {}
        for name, of_b in found[b].items():
            of_a = found[a][name]
            row[name] = paired_difference(of_b, of_a, seed) if _comparable(name, of_a, of_b) else None
        rows.append(Difference(run=b, less=a, **row))
    return rows


def _comparable(name: str, a: Grouped, b: Grouped) -> bool:
    """Tell whether both runs have a score; what is of images, not all runs have, and not of all their images."""
    of_images = name == "ground" or name in DISTANCES
    return not of_images or (a.layout_ids == b.layout_ids and bool((a.counts == b.counts).all()))
