"""The images that show how a student grows: which of them, and the strip of them as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.layouts import Layout
from common.pictures import Picture, in_columns, write_png
from stage2_student.evaluation.results import RESULTS_FILE, ImageResult, load_results
from stage2_student.watching.log import Measured, best_of

STRIP_FILE = "strip.png"
ROWS = 8
"""Layouts shown."""
STRIP_STEPS = 24
"""Columns of the strip besides the teacher's."""
_SIDE = 160
"""Larger images are scaled down to this in the strip, pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A layout's image by one checkpoint, or by the teacher's own solve."""

    label: str
    path: Path
    result: ImageResult


def choose(measured: Sequence[Measured], most: int) -> list[Measured]:
    """Choose checkpoints, evenly spaced and in order; the first, the newest and the best are among them."""
    if len(measured) <= most:
        return list(measured)
    places = {round(place) for place in np.linspace(0, len(measured) - 1, most - 1)}
    best = best_of(measured)
    places |= {measured.index(best)} if best is not None else set()
    return [measured[place] for place in sorted(places)]


def columns(
    folder: Path, teacher: str, measured: Sequence[Measured], layouts: Sequence[Layout]
) -> list[list[Shown]]:
    """Return the images that were kept, the teacher's first and then by step; one that is gone is left out.

    Args:
        folder: where watchers of the run keep their files.
        teacher: folder of the teacher's results, in `runs/`.
        measured: the checkpoints to show.
        layouts: the layouts to show.

    Returns:
        For each layout its images.
    """
    shown = [("teacher's own solve", teacher), *((f"step {one.step}", one.folder) for one in measured)]
    rows: list[list[Shown]] = [[] for _ in layouts]
    for label, name in shown:
        place = folder / "runs" / name
        results = {result.layout_id: result for result in load_results(place / RESULTS_FILE)}
        for row, layout in zip(rows, layouts, strict=True):
            result = results.get(layout.layout_id)
            if result is not None and result.image and (path := place / "images" / result.image).is_file():
                row.append(Shown(label=label, path=path, result=result))
    return rows


def write_strip(folder: Path, rows: Sequence[Sequence[Shown]]) -> None:
    """Write the strip: a row for each layout, a column for the teacher and for each checkpoint.

    Args:
        folder: where watchers of the run keep their files.
        rows: see `columns`.
    """
    found: dict[str, dict[int, Picture]] = {}
    for number, row in enumerate(rows):
        for shown in row:
            found.setdefault(shown.label, {})[number] = _read(shown.path)
    if not found:
        return
    blank = np.full_like(next(iter(next(iter(found.values())).values())), 255)
    write_png(
        folder / STRIP_FILE,
        in_columns({label: [of.get(number, blank) for number in range(len(rows))] for label, of in found.items()}),
    )


def _read(path: Path) -> Picture:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)
