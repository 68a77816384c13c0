"""The evaluation: whoever samples, on the same layouts and noise, read by the same judge.

Nothing here knows how an image comes about: a run is a callable that samples a batch, be it the teacher at some
number of steps, a student, or the true images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.layouts import Layout
from common.pictures import write_png
from common.progress import Progress
from common.signals import StopFlag
from stage2_student.evaluation.detector import Detector
from stage2_student.evaluation.endpoint import Distance
from stage2_student.evaluation.image_features import append_features
from stage2_student.evaluation.judges import Judge
from stage2_student.evaluation.reading import ground_difference, read_images
from stage2_student.evaluation.results import (
    RESULTS_FILE,
    RUN_FILE,
    ImageResult,
    check_or_create,
    load_results,
    open_results,
    slug,
)

Job = tuple[Layout, int]
"""One image to sample: a layout and the index among its images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A batch of sampled images and what it cost."""

    images: Sequence[NDArray[np.uint8]]
    """Each (H, W, 3) uint8 RGB, in the jobs' order."""
    seconds: float = 0.0
    """For the whole batch: networks and decoding, without the encoding of prompts."""
    unet_evaluations: float = 0.0
    """Samples that passed the UNet, in the whole batch."""
    writenet_evaluations: float = 0.0
    """Samples that passed WriteNet, in the whole batch."""
    distances: Sequence[Distance] = ()
    """From the teacher's own solves, in the jobs' order; empty where they are not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Someone who samples."""

    label: str
    """As in the tables, unique in a folder, e.g. "teacher, 20 steps (upstream)"."""
    kind: str
    """"truth", "vae", "teacher", "student" or "images"."""
    sample: Callable[[Sequence[Job]], Sampled]
    """Samples a batch. An image may depend on its job, never on the others of the batch."""
    steps: int = 0
    """Solver steps, for the plot; 0 if there are none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the images depend on (fingerprints, grid, guidance ...): results of other settings are not mixed in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all runs of one folder share."""

    layouts: Sequence[Layout]
    """Distinct ids."""
    samples_per_layout: int = 1
    batch_size: int = 8
    keep_images: int = 16
    """Layouts whose first image is kept as a PNG file, from the first on."""
    keep_all: bool = False
    """Keep every image: for measures that need them all."""
    detector: Detector | None = None
    """Says what every image looks like, for KID; None for no KID."""
    truth: Callable[[Layout], NDArray[np.uint8] | None] | None = None
    """Returns a layout's true image, (H, W, 3) RGB; None if who samples was shown its ground, or there is none."""

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for layout in self.layouts:
            if layout.layout_id in seen:
                raise DataError(
                    f"layout {layout.layout_id}: received twice, expected distinct layouts; remove the copy"
                )
            seen.add(layout.layout_id)

    def keeps(self, layout: Layout, sample: int) -> bool:
        """Whether an image is kept."""
        return self.keep_all or (sample == 0 and layout in self.layouts[: self.keep_images])

    def jobs(self) -> list[Job]:
        """Return every image that is to be sampled, in order."""
        return [(layout, sample) for layout in self.layouts for sample in range(self.samples_per_layout)]


def run_folder(folder: Path, label: str) -> Path:
    """Return where a run's results lie in an evaluation's folder."""
    return folder / "runs" / slug(label)


def evaluate_run(run: Run, plan: Plan, judge: Judge, folder: Path, stop: StopFlag) -> list[ImageResult]:
    """Sample and read all images of a run that the folder does not hold yet.

    Args:
        run: who samples.
        plan: what is sampled.
        judge: the judge.
        folder: of the evaluation; made if missing.
        stop: looked at between batches.

    Returns:
        The results of all images, in the plan's order.

    Raises:
        DataError: the folder holds results of this run under other settings.
        Stopped: a signal came; finished batches are on disk.
    """
    place = run_folder(folder, run.label)
    description = {"label": run.label, "kind": run.kind, "steps": run.steps, "settings": dict(run.settings)}
    check_or_create(place / RUN_FILE, description, f"run {run.label!r}")
    done = {(result.layout_id, result.sample): result for result in load_results(place / RESULTS_FILE)}
    jobs = plan.jobs()
    left = [(layout, sample) for layout, sample in jobs if (layout.layout_id, sample) not in done]
    with (
        Progress(len(jobs), run.label, "image", initial=len(jobs) - len(left)) as progress,
        open_results(place / RESULTS_FILE) as writer,
    ):
        for start in range(0, len(left), plan.batch_size):
            stop.raise_if_requested(f"{len(done)} of {len(jobs)} images of run {run.label!r} are evaluated")
            results = _evaluate_batch(run, left[start : start + plan.batch_size], judge, place, plan)
            writer.append(*results)
            done.update({(result.layout_id, result.sample): result for result in results})
            progress.update(len(results))
    return [done[layout.layout_id, sample] for layout, sample in jobs]


def _evaluate_batch(run: Run, jobs: Sequence[Job], judge: Judge, place: Path, plan: Plan) -> list[ImageResult]:
    sampled = run.sample(jobs)
    lines = read_images(judge, sampled.images, [layout for layout, _ in jobs])
    if plan.detector is not None:  # before the results: an image that has these is done
        append_features(place, jobs, plan.detector, sampled.images)
    distances: Sequence[Distance | None] = sampled.distances or [None] * len(jobs)
    results = []
    for (layout, sample), image, of_image, distance in zip(jobs, sampled.images, lines, distances, strict=True):
        name = ""
        if plan.keeps(layout, sample):
            name = f"{layout.layout_id}_{sample}.png"
            write_png(place / "images" / name, image)
        truth = plan.truth(layout) if plan.truth is not None else None
        ground = None if truth is None else ground_difference(image, truth, layout)
        results.append(
            ImageResult(
                layout_id=layout.layout_id,
                sample=sample,
                lines=of_image,
                seconds=round(sampled.seconds / len(jobs), 6),
                unet_evaluations=sampled.unet_evaluations / len(jobs),
                writenet_evaluations=sampled.writenet_evaluations / len(jobs),
                image=name,
                ground=None if ground is None else round(ground, 4),
                distance=distance,
            )
        )
    return results
