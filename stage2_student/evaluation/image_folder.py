"""Images that someone else made, by AnyText-benchmark's convention: NAME_0.jpg ... NAME_3.jpg for each layout."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from PIL import Image, UnidentifiedImageError

from common.errors import DataError, reason
from common.faults import raise_disk_fault
from common.files import canonical_json, sha256_file
from common.layouts import Layout
from common.pictures import as_seen
from common.progress import Progress
from stage2_student.evaluation.runs import Job, Run, Sampled

EXTENSIONS = ("jpg", "png", "jpeg", "webp")


def name_layouts(folder: Path, layouts: Sequence[Layout], image_names: Sequence[str]) -> list[Layout]:
    """Name each layout as its images are named in a folder: by the most of the annotated name that is there.

    Args:
        folder: of the images.
        layouts: under their benchmark's names, which end at the first dot.
        image_names: of the annotated images, as annotated.

    Raises:
        DataError: two annotated images have one name in the folder.
    """
    named, owner = [], dict[str, str]()
    for layout, image_name in zip(layouts, image_names, strict=True):
        pure = PurePosixPath(image_name)
        inside = image_name and not pure.is_absolute() and ".." not in pure.parts
        candidates = [str(pure.with_suffix("")), pure.stem] if inside else []
        there = (replace(layout, name=name) for name in candidates)
        chosen = next((one for one in there if find_image(folder, one, 0) is not None), layout)
        other = owner.setdefault(chosen.name, image_name)
        if other != image_name and folder.is_dir():
            whole = [f"{PurePosixPath(name).with_suffix('')}_0.jpg" for name in (other, image_name)]
            raise DataError(
                f"{folder}: the annotated images {other!r} and {image_name!r} would both be scored by"
                f" {chosen.name}_0; name their images by their whole names, {' and '.join(whole)}"
            )
        named.append(chosen)
    return named


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


def hash_images(folder: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """Return each file's SHA-256, hexadecimal.

    Args:
        folder: that they lie in, for the progress.
        paths: the files.
    """
    hashes = {}
    with Progress(len(paths), f"hashing {folder}", "image") as progress:
        for path in paths:
            hashes[path] = sha256_file(path)
            progress.update()
    return hashes


def digest_images(hashes: Mapping[Path, str]) -> str:
    """Return a short hash of a folder's images, names and contents, from each file's SHA-256."""
    entries = sorted([path.name, value] for path, value in hashes.items())
    return hashlib.sha256(canonical_json(entries)).hexdigest()[:16]


def folder_run(folder: Path, label: str, jobs: Sequence[Job]) -> Run:
    """Return the run whose images lie in a folder; its settings hold what these images are.

    Args:
        folder: of the images.
        label: of the run.
        jobs: all images that are to be scored; each file is read once here.

    Raises:
        DataError: an image is not there.
    """
    files: dict[tuple[str, int], Path] = {}
    for layout, sample in jobs:
        path = find_image(folder, layout, sample)
        if path is None:
            raise DataError(f"{folder}: {layout.name}_{sample}.jpg is missing; it was there a moment ago")
        files[layout.layout_id, sample] = path
    hashes = hash_images(folder, list(dict.fromkeys(files.values())))

    def read(jobs: Sequence[Job]) -> Sampled:
        images = []
        for layout, sample in jobs:
            path = files[layout.layout_id, sample]
            try:
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest() != hashes[path]:
                    raise DataError(
                        f"{path}: changed while the folder was being scored; score it again, with another --out,"
                        " when all of its images are final"
                    )
                with Image.open(io.BytesIO(data)) as image:
                    images.append(as_seen(image))
            except (OSError, ValueError, UnidentifiedImageError) as error:
                raise_disk_fault(error, path)
                raise DataError(f"{path}: not readable as an image ({reason(error)}); make it again") from None
        return Sampled(images=images)

    settings = {"folder": folder.resolve().name, "images": digest_images(hashes)}
    return Run(label=label, kind="images", sample=read, settings=settings)
