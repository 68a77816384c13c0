"""What a report shows, gathered from an evaluation's folder and from the logs of training runs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import DataError, reason
from common.faults import raise_disk_fault
from common.layouts import Layout
from shards.files.frozen import FrozenSet, read_frozen
from shards.files.names import FROZEN
from stage2_student.evaluation.invocation import read_invocations
from stage2_student.evaluation.results import (
    RESULTS_FILE,
    ImageResult,
    load_layouts,
    load_results,
    read_description,
)
from stage2_student.evaluation.summary import summarise
from stage2_student.evaluation.table import Summary
from stage2_student.training.runlog import read_log

MAX_SIDE = 256
"""Larger images are scaled down to this, pixels: a page with hundreds of them must still open."""
LOSSLESS_SIDE = 160
"""Images up to this are embedded as PNG, pixels; larger ones as JPEG."""
CONFIG_FILE = "config.json"
"""A training run's resolved configuration, in its folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A training run: its curve, and what it was made from."""

    folder: Path
    losses: tuple[tuple[int, float], ...]
    """(step, loss), ascending."""
    config: Mapping[str, Any]
    """Resolved; empty if the run kept none."""
    shards: FrozenSet | None = None
    """What it trained on; None if the run kept no list."""
    held_out_losses: tuple[tuple[int, float], ...] = ()
    """Of records that were not trained on, likewise; none if it measured none."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One layout's image by one run."""

    run: str
    """The run's label."""
    image: str
    """data: URI."""
    result: ImageResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All that is on the page."""

    folder: Path
    """The evaluation's."""
    summary: Summary
    """Its table."""
    examples: tuple[tuple[Layout, tuple[Example, ...]], ...]
    """For each shown layout the same noise sampled by each run, in the table's order."""
    num_examples: int
    """Layouts to show at most."""
    trainings: tuple[Training, ...]
    invocations: tuple[Mapping[str, Any], ...]
    """One per `evaluate` command, oldest first."""


def gather(folder: Path, runs: Sequence[Path] = (), num_examples: int = 12) -> ReportData:
    """Collect a report's data; the summary is computed anew.

    Args:
        folder: of the evaluation.
        runs: folders of training runs, for their curves.
        num_examples: layouts whose images are shown.

    Raises:
        DataError: the folder is not an evaluation's, a run has no log, or a file is damaged.
    """
    summary = summarise(folder)
    return ReportData(
        folder=folder,
        summary=summary,
        examples=tuple(_examples(folder, summary, num_examples)),
        num_examples=num_examples,
        trainings=tuple(read_training(run) for run in runs),
        invocations=tuple(read_invocations(folder)),
    )


def _examples(folder: Path, summary: Summary, count: int) -> list[tuple[Layout, tuple[Example, ...]]]:
    """Return the first image of each of the first layouts; only what is shown is read and embedded."""
    layouts, _ = load_layouts(folder)
    kept: dict[str, list[tuple[str, Path, ImageResult]]] = {}
    for run in summary.runs:
        place = folder / "runs" / run.folder
        for result in load_results(place / RESULTS_FILE):
            path = place / "images" / result.image
            if result.sample == 0 and result.image and path.is_file():
                kept.setdefault(result.layout_id, []).append((run.label, path, result))
    shown = [layout for layout in layouts if layout.layout_id in kept][:count]
    return [(layout, tuple(_example(*found) for found in kept[layout.layout_id])) for layout in shown]


def _example(label: str, path: Path, result: ImageResult) -> Example:
    return Example(run=label, image=embed_image(path), result=result)


def embed_image(path: Path) -> str:
    """Return an image file as a data: URI, scaled down if it is large.

    Raises:
        DataError: it is no image.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise_disk_fault(error, path)
        raise DataError(
            f"{path}: not readable as an image ({reason(error)}); evaluate again without this run's folder"
        ) from None
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    kind = "png" if max(image.size) <= LOSSLESS_SIDE else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=88, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_training(run: Path) -> Training:
    """Read a training run's curve, and what it was made from.

    Raises:
        DataError: it has no log, or a file is damaged.
    """
    lines = read_log(run)
    losses, held_out = (
        tuple((int(line["step"]), float(line[key])) for line in lines if line.get(key) is not None)
        for key in ("loss", "held_out_loss")
    )
    if not losses:
        raise DataError(f"{run}: no training log there; expected the folder of a training run")
    frozen = read_frozen(run) if (run / FROZEN).exists() else None
    path, remedy = run / CONFIG_FILE, "expected a JSON object; restore it, or remove it to report without it"
    config = read_description(path, remedy) if path.exists() else {}
    return Training(folder=run, losses=losses, config=config, shards=frozen, held_out_losses=held_out)
