"""FID and CLIP score of a run's kept images, where their networks' weights are given by path.

Text accuracy says nothing of how an image looks; these two do, roughly. FID needs thousands of images to mean
much. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.errors import DataError, UsageError, reason
from common.faults import raise_disk_fault
from common.files import canonical_json, sha256_file, write_bytes_atomic
from common.pictures import as_seen
from common.progress import Progress
from common.signals import StopFlag
from stage2_student.evaluation.image_folder import digest_images, hash_images
from stage2_student.evaluation.results import RESULTS_FILE, load_results, read_description
from stage2_student.evaluation.runs import Plan
from stage2_student.evaluation.summary import QUALITY_FILE

BATCH = 16
REFERENCE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Images from elsewhere that FID compares with."""

    paths: tuple[Path, ...]
    """Of any sizes."""
    digest: str
    """Of their names and contents."""


def find_reference(folder: Path) -> Reference:
    """Find the images of evaluate.fid_reference, those directly in the folder.

    Raises:
        DataError: it is no folder, or holds fewer than two.
    """
    found = folder.iterdir() if folder.is_dir() else ()
    paths = tuple(sorted(path for path in found if path.suffix.lower() in REFERENCE_SUFFIXES and path.is_file()))
    if len(paths) < 2:
        raise DataError(
            f"evaluate.fid_reference {folder}: received {len(paths)} images, expected a folder with at least two"
            " .png or .jpg files directly in it; name the folder of the reference images"
        )
    return Reference(paths=paths, digest=digest_images(hash_images(folder, paths)))


class Inception(nn.Module):
    """The TorchScript Inception network of the usual FID, inception-2015-12-05.pt."""

    def __init__(self, weights: Path) -> None:
        """Load it.

        Args:
            weights: the TorchScript file: called with uint8 images (B, 3, H, W) and return_features=True it gives
                (B, F).

        Raises:
            DataError: the file is none.
        """
        super().__init__()
        try:
            self.network = torch.jit.load(str(weights), map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise_disk_fault(error, weights)
            raise DataError(
                f"evaluate.fid_weights {weights}: {reason(error)}; expected the TorchScript file"
                " inception-2015-12-05.pt"
            ) from None

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, F) of images, (B, 3, H, W) uint8."""
        features: Tensor = self.network(images, return_features=True)
        return features


def load_fid(weights: Path) -> Any:
    """Return an empty FID metric.

    Args:
        weights: see `Inception`.

    Raises:
        UsageError: torchmetrics is not installed.
        DataError: the weights cannot be loaded.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ModuleNotFoundError:
        raise UsageError("evaluate.fid_weights: torchmetrics is not installed; pip install torchmetrics") from None
    return FrechetInceptionDistance(feature=_load_inception(weights))


@functools.lru_cache(maxsize=1)  # the same for all runs
def _load_inception(weights: Path) -> Inception:
    return Inception(weights)


@functools.lru_cache(maxsize=1)
def load_clip(folder: Path) -> tuple[Any, Any]:
    """Return a CLIP model and its processor.

    Args:
        folder: as transformers saves both.

    Raises:
        DataError: the folder holds no CLIP model.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        return (
            CLIPModel.from_pretrained(folder, local_files_only=True).eval(),
            CLIPProcessor.from_pretrained(folder, local_files_only=True),
        )
    except (OSError, ValueError) as error:
        raise_disk_fault(error, folder)
        raise DataError(
            f"evaluate.clip_score_model {folder}: {reason(error)}; expected a folder of a CLIP model"
        ) from None


def fid(weights: Path, real: Sequence[Path], sampled: Sequence[Path], stop: StopFlag) -> float:
    """Return the Frechet inception distance between two sets of image files.

    Args:
        weights: see `Inception`.
        real: at least two, of any sizes: the network scales each to its own.
        sampled: at least two.
        stop: looked at between batches.

    Raises:
        UsageError: torchmetrics is not installed.
        DataError: the weights cannot be loaded, or there are too few images.
        Stopped: a signal came.

    Source: Heusel et al. 2017; torchmetrics' implementation.
    """
    metric = load_fid(weights)
    if min(len(real), len(sampled)) < 2:
        raise DataError(
            f"FID: received {len(sampled)} sampled and {len(real)} real images, expected at least two of each;"
            " evaluate more layouts, or leave evaluate.fid_weights out"
        )
    with Progress(len(real) + len(sampled), "FID", "image") as progress:
        for paths, is_real in ((real, True), (sampled, False)):
            for images in _batches(paths):
                stop.raise_if_requested("all images of this run are evaluated, their FID is not yet computed")
                metric.update(images, real=is_real)
                progress.update(len(images))
    return float(metric.compute())


@torch.no_grad()
def clip_score(folder: Path, sampled: Sequence[Path], captions: Sequence[str], stop: StopFlag) -> float:
    """Return the mean CLIP score: 100 times the cosine of image and caption, at least 0.

    Args:
        folder: see `load_clip`.
        sampled: image files.
        captions: one each; cut at the model's length.
        stop: looked at between batches.

    Raises:
        DataError: the folder holds no CLIP model.
        Stopped: a signal came.

    Source: Hessel et al. 2021, with weight 100 as in torchmetrics.
    """
    model, processor = load_clip(folder)
    scores: list[Tensor] = []
    with Progress(len(sampled), "CLIP score", "image") as progress:
        for start in range(0, len(sampled), BATCH):
            stop.raise_if_requested("all images of this run are evaluated, their CLIP score is not yet computed")
            images = [_read(path) for path in sampled[start : start + BATCH]]
            inputs = processor(
                text=list(captions[start : start + BATCH]),
                images=images,
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=model.config.text_config.max_position_embeddings,
            )
            found = model(**inputs)
            scores.append(100 * (found.image_embeds * found.text_embeds).sum(dim=1).clamp(min=0))  # (B,)
            progress.update(len(images))
    return float(torch.cat(scores).mean())


def measure_quality(
    run: Path,
    plan: Plan,
    *,
    fid_weights: Path | None,
    clip_model: Path | None,
    real: Path | Reference,
    captions: Mapping[str, str],
    stop: StopFlag,
) -> dict[str, Any]:
    """Compute what is wanted of a run and note it in its folder; done once.

    Args:
        run: the run's folder, complete.
        plan: of the evaluation.
        fid_weights: see `Inception`; None for no FID.
        clip_model: see `clip_score`; None for no CLIP score.
        real: what FID compares with: the folder of the true images' run, or images from elsewhere.
        captions: for the CLIP score, by layout id.
        stop: looked at between batches.

    Returns:
        fid and clip_score, those that were wanted, and the hashes of what they were computed with.

    Raises:
        UsageError: torchmetrics is not installed.
        DataError: images are missing or were not kept, or weights cannot be loaded.
        Stopped: a signal came; nothing of this run's measures is kept.
    """
    weights = {
        "fid_weights": sha256_file(fid_weights)[:16] if fid_weights else "",
        "fid_reference": real.digest if fid_weights and isinstance(real, Reference) else "",
        "clip_model": _hash_folder(clip_model) if clip_model else "",
        "captions": hashlib.sha256(canonical_json(dict(captions))).hexdigest()[:16] if clip_model else "",
    }
    path = run / QUALITY_FILE
    if path.exists() and (known := read_description(path)).get("weights") == weights:
        return known
    images = kept_images(run, plan)
    sampled = [path for path, _ in images]
    quality: dict[str, Any] = {"weights": weights}
    if fid_weights is not None:
        compared = real.paths if isinstance(real, Reference) else [path for path, _ in kept_images(real, plan)]
        quality["fid"] = fid(fid_weights, compared, sampled, stop)
    if clip_model is not None:
        quality["clip_score"] = clip_score(
            clip_model, sampled, [captions[layout_id] for _, layout_id in images], stop
        )
    write_bytes_atomic(path, canonical_json(quality))
    return quality


def kept_images(run: Path, plan: Plan) -> list[tuple[Path, str]]:
    """Return a run's image files and their layouts' ids, in the plan's order.

    Raises:
        DataError: not all are sampled, or not all were kept.
    """
    results = {(result.layout_id, result.sample): result for result in load_results(run / RESULTS_FILE)}
    wanted = [(layout.layout_id, sample) for layout, sample in plan.jobs()]
    if missing := [job for job in wanted if job not in results]:
        raise DataError(
            f"{run}: received {len(wanted) - len(missing)} images, expected all {len(wanted)} of the evaluation,"
            " to measure or compare with; evaluate this run again to go on with it (--truth for the true images)"
        )
    paths = [(run / "images" / results[job].image, job[0]) for job in wanted]
    if any(not results[job].image for job in wanted) or not all(path.is_file() for path, _ in paths):
        raise DataError(
            f"{run}: not all of its images were kept; with evaluate.fid_weights or evaluate.clip_score_model set"
            " from the start they are: evaluate again with another --out"
        )
    return paths


def _hash_folder(folder: Path) -> str:
    weights = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    return sha256_file(weights[0])[:16] if weights else ""


def _batches(paths: Sequence[Path]) -> Iterator[Tensor]:
    """Read images, (B, 3, H, W) uint8, alone where their sizes differ."""
    for start in range(0, len(paths), BATCH):
        images = [_read(path) for path in paths[start : start + BATCH]]
        if len({image.shape for image in images}) == 1:
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        else:
            yield from (torch.from_numpy(image).permute(2, 0, 1)[None] for image in images)


def _read(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        with Image.open(path) as image:
            return as_seen(image).copy()
    except (OSError, ValueError) as error:
        raise_disk_fault(error, path)
        raise DataError(f"{path}: not readable as an image ({reason(error)}); replace the file") from None
