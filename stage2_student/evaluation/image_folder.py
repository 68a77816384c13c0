"""Images that someone else drew, by AnyText-benchmark's convention: NAME_0.jpg ... NAME_3.jpg for each layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.errors import DataError
from stage2_student.evaluation.layouts import Layout
from stage2_student.evaluation.runs import Drawn, Job, Run

EXTENSIONS = ("jpg", "png", "jpeg", "webp")


def find_image(folder: Path, layout: Layout, sample: int) -> Path | None:
    """Return the file of a layout's sample, or None."""
    for extension in EXTENSIONS:
        if (path := folder / f"{layout.name}_{sample}.{extension}").is_file():
            return path
    return None


def count_samples(folder: Path, layouts: Sequence[Layout]) -> int:
    """Return how many samples each layout has, and check that all have as many.

    Raises:
        DataError: the folder is missing, a layout has no name, or its image is not there.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected images NAME_0.jpg ... by their names in the annotations"
        )
    samples = 0
    while layouts and find_image(folder, layouts[0], samples) is not None:
        samples += 1
    for layout in layouts:
        if not layout.name:
            raise DataError(f"layout {layout.layout_id} has no image name; expected annotations with img_name")
        for sample in range(max(1, samples)):
            if find_image(folder, layout, sample) is None:
                raise DataError(
                    f"{folder}: {layout.name}_{sample}.jpg is missing; expected {max(1, samples)} images"
                    f" {layout.name}_0 ... for each of the {len(layouts)} layouts, as .jpg, .png, .jpeg or .webp"
                )
    return samples


def folder_run(folder: Path, label: str) -> Run:
    """Return the run whose images lie in a folder."""

    def draw(jobs: Sequence[Job]) -> Drawn:
        images = []
        for layout, sample in jobs:
            path = find_image(folder, layout, sample)
            if path is None:
                raise DataError(f"{folder}: {layout.name}_{sample}.jpg is missing; it was there a moment ago")
            try:
                with Image.open(path) as image:
                    images.append(np.asarray(image.convert("RGB")))
            except (OSError, UnidentifiedImageError) as error:
                raise DataError(f"{path}: not readable as an image ({error}); draw it again") from None
        return Drawn(images=images)

    return Run(label=label, kind="images", draw=draw, settings={"folder": folder.name})
