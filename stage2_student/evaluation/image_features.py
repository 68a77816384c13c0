"""Features of a run's images on disk, one line of JSON an image, and the KID of an evaluation's runs from them.

They are taken when an image is drawn, so that no image need be kept for them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, reason
from common.jsonl import LineWriter, read_objects
from common.layouts import Layout
from stage2_student.evaluation.detector import Detector
from stage2_student.evaluation.kernel_distance import ImageFeatures, halves_distance, kernel_distance
from stage2_student.evaluation.metrics import Estimate
from stage2_student.evaluation.results import slug

FEATURES_FILE = "features.jsonl"
"""Of a run: layout_id, sample, detector (its identity) and values (float32 in base64, little-endian) a line."""


class _Run(Protocol):
    @property
    def label(self) -> str: ...
    @property
    def kind(self) -> str: ...


def append_features(
    place: Path, jobs: Sequence[tuple[Layout, int]], detector: Detector, images: Sequence[NDArray[np.uint8]]
) -> None:
    """Note what a batch of a run's images looks like; what this returned from is on disk.

    Args:
        place: the run's folder.
        jobs: each image's layout and sample.
        detector: looks at them.
        images: each (H, W, 3) uint8 RGB.
    """
    values = detector.features(images).astype("<f4")
    lines: list[Mapping[str, Any]] = [
        {
            "layout_id": layout.layout_id,
            "sample": sample,
            "detector": detector.identity,
            "values": base64.b64encode(row.tobytes()).decode(),
        }
        for (layout, sample), row in zip(jobs, values, strict=True)
    ]
    with LineWriter[Mapping[str, Any]](place / FEATURES_FILE, durable=True) as writer:
        writer.append(*lines)


def load_features(path: Path, expected: Iterable[tuple[str, int]]) -> tuple[str, ImageFeatures] | None:
    """Return the detector's identity and what all images of a run look like; None if that is not known of all.

    Args:
        path: the run's file; an image that is there twice counts as it is there last.
        expected: layout ids and samples, of each layout the same samples.

    Raises:
        DataError: a line's values are damaged.
    """
    found: dict[tuple[str, int], tuple[str, NDArray[np.float32]]] = {}
    for number, line in enumerate(read_objects(path), 1):
        try:
            values = np.frombuffer(base64.b64decode(line["values"], validate=True), "<f4")
            found[line["layout_id"], line["sample"]] = str(line["detector"]), values
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, line {number}: damaged ({reason(error)}); remove the file: KID is then left out, or"
                " evaluate again with another --out"
            ) from None
    keys = sorted(expected)
    if not keys or not found.keys() >= set(keys):
        return None
    if len({(found[key][0], found[key][1].shape) for key in keys}) > 1:  # two detectors' are no set
        return None
    names = tuple(dict.fromkeys(name for name, _ in keys))
    values = np.stack([found[key][1] for key in keys])
    return found[keys[0]][0], ImageFeatures(
        layout_ids=names, values=values.reshape(len(names), -1, values.shape[1])
    )


def kernel_distances(
    folder: Path, runs: Sequence[_Run], expected: Sequence[tuple[str, int]], seed: int
) -> dict[str, Estimate]:
    """Return KID to the true images by a run's label, of the runs whose images were looked at.

    Args:
        folder: `runs` of an evaluation.
        runs: complete ones; without the true images' among them nothing can be compared.
        expected: layout ids and samples of each run's images.
        seed: keys the resampling.
    """
    known = {run.label: load_features(folder / slug(run.label) / FEATURES_FILE, expected) for run in runs}
    truth = next((known[run.label] for run in runs if run.kind == "truth"), None)
    distances: dict[str, Estimate] = {}
    if truth is None or len(truth[1].layout_ids) < 2:
        return distances
    for run in runs:
        features = known[run.label]
        if run.kind == "truth":
            of_run = halves_distance(truth[1], seed)
        else:
            same = features is not None and features[0] == truth[0]
            of_run = kernel_distance(truth[1], features[1], seed) if features is not None and same else None
        if of_run is not None:
            distances[run.label] = of_run
    return distances
