"""FID and CLIP score of a run's kept images, where their networks' weights are given by path.

Text accuracy says nothing of how an image looks; these two do, roughly. FID needs thousands of images to mean
much. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.errors import DataError, UsageError
from common.files import canonical_json, sha256_file, write_bytes_atomic
from stage2_student.evaluation.layouts import Layout
from stage2_student.evaluation.results import RESULTS_FILE, load_results, read_description
from stage2_student.evaluation.summary import QUALITY_FILE

BATCH = 16


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
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"evaluate.fid_weights {weights}: {reason}; expected the TorchScript file inception-2015-12-05.pt"
            ) from None

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, F) of images, (B, 3, H, W) uint8."""
        features: Tensor = self.network(images, return_features=True)
        return features


def fid(weights: Path, real: Sequence[Path], drawn: Sequence[Path]) -> float:
    """Return the Frechet inception distance between two sets of image files.

    Args:
        weights: see `Inception`.
        real: at least two.
        drawn: at least two.

    Raises:
        UsageError: torchmetrics is not installed.
        DataError: the weights cannot be loaded.

    Source: Heusel et al. 2017; torchmetrics' implementation.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ModuleNotFoundError:
        raise UsageError("evaluate.fid_weights: torchmetrics is not installed; pip install torchmetrics") from None
    metric = FrechetInceptionDistance(feature=Inception(weights))
    for paths, is_real in ((real, True), (drawn, False)):
        for images in _batches(paths):
            metric.update(images, real=is_real)
    return float(metric.compute())


@torch.no_grad()
def clip_score(folder: Path, drawn: Sequence[Path], captions: Sequence[str]) -> float:
    """Return the mean CLIP score: 100 times the cosine of image and caption, at least 0.

    Args:
        folder: of a CLIP model and its processor, as transformers saves them.
        drawn: image files.
        captions: one each; cut at the model's length.

    Raises:
        DataError: the folder holds no CLIP model.

    Source: Hessel et al. 2021, with weight 100 as in torchmetrics.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"evaluate.clip_score_model {folder}: {reason}; expected a folder of a CLIP model"
        ) from None
    scores: list[Tensor] = []
    for start in range(0, len(drawn), BATCH):
        images = [_read(path) for path in drawn[start : start + BATCH]]
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
    return float(torch.cat(scores).mean())


def measure_quality(
    run: Path, layouts: Sequence[Layout], *, fid_weights: Path | None, clip_model: Path | None, truth: Path
) -> dict[str, Any]:
    """Compute what is wanted of a run and note it in its folder; done once.

    Args:
        run: the run's folder, complete.
        layouts: of the evaluation.
        fid_weights: see `Inception`; None for no FID.
        clip_model: see `clip_score`; None for no CLIP score.
        truth: folder of the true images' run, which FID compares with.

    Returns:
        fid and clip_score, those that were wanted, and the weights' hashes.

    Raises:
        UsageError: torchmetrics is not installed.
        DataError: images were not kept, or weights cannot be loaded.
    """
    weights = {
        "fid_weights": sha256_file(fid_weights)[:16] if fid_weights else "",
        "clip_model": _hash_folder(clip_model) if clip_model else "",
    }
    path = run / QUALITY_FILE
    if path.exists() and (known := read_description(path)).get("weights") == weights:
        return known
    images = kept_images(run)
    quality: dict[str, Any] = {"weights": weights}
    if fid_weights is not None:
        quality["fid"] = fid(fid_weights, [path for path, _ in kept_images(truth)], [path for path, _ in images])
    if clip_model is not None:
        captions = {layout.layout_id: layout.caption for layout in layouts}
        quality["clip_score"] = clip_score(
            clip_model, [path for path, _ in images], [captions[layout_id] for _, layout_id in images]
        )
    write_bytes_atomic(path, canonical_json(quality))
    return quality


def kept_images(run: Path) -> list[tuple[Path, str]]:
    """Return a run's image files and their layouts' ids.

    Raises:
        DataError: not all were kept.
    """
    results = load_results(run / RESULTS_FILE)
    paths = [(run / "images" / result.image, result.layout_id) for result in results]
    if any(not result.image for result in results) or not all(path.is_file() for path, _ in paths):
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
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))
