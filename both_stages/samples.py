"""What sampling returns, and what a picture's file says of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.files import canonical_json, sha256_file
from common.pictures import Picture
from stage2_student.student.adapter import Card, adapter_files
from stage2_student.student.sample import Start


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """B sampled images, and what they cost."""

    latents: Tensor
    """(B, C, h, w) float32."""
    pictures: list[Picture]
    """Each (H, W, 3) uint8 RGB."""
    teacher: list[Picture] | None
    """With `compare`, the teacher's pictures of the same noise."""
    texts: list[dict[str, str]]
    """What each picture's file is to say of itself: prompt, lines, seed, model; `write_png` takes it."""
    doubts: list[str]
    """What will hardly be seen as it is asked for, a line each."""
    seconds: float
    """From noise to pictures, of all B together; without encoding, and without the teacher's pictures."""
    encode_seconds: float
    """From prompts to what the networks take, the loading of the encoders included where they were not yet."""
    unet_calls: int
    """UNet calls of each image, counted; a guided step has two."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """One image to be."""

    start: Start
    """What it is sampled from."""
    says: dict[str, str]
    """What is said of it, besides seed and model."""
    seed: int | None
    """None for 0, or for the noise that the teacher had."""
    number: int
    """Of the image among those of its start."""


def describe_model(config: Config, steps: int | None, student: Card | None, adapter: Path | None) -> str:
    """Say who samples and how, as JSON: steps, guidance, and the fingerprints of the weights.

    Args:
        config: names the checkpoint.
        steps: of the teacher; None for precompute.solver_steps.
        student: its card; None if the teacher samples.
        adapter: the student's.
    """
    if student is None or adapter is None:
        who: dict[str, Any] = {
            "who": "teacher",
            "steps": steps or config.precompute.solver_steps,
            "guidance_scale": config.precompute.guidance_scale,
            "fingerprint": fingerprint(config.find_checkpoint(), "teacher"),
        }
    else:
        files = {name: sha256_file(path) for name, path in adapter_files(adapter).items()}
        who = {
            "who": "student",
            "steps": student.num_steps,
            "timesteps": list(student.timesteps),
            "sampler": student.sampler,
            "guidance_scale": 1.0,
            "adapter": hashlib.sha256(canonical_json(files)).hexdigest(),
            "base_fingerprint": student.base_fingerprint,
            **({"ancestors": student.to_json()["ancestors"]} if student.ancestors else {}),
        }
    return canonical_json(who).decode().strip()


def seed_of(asked: Asked) -> dict[str, str]:
    """Say which noise an image was sampled from."""
    start = asked.start
    if start.noise is not None and start.meta is not None:
        return {"seed": str(start.meta.seeds[asked.number]), "noise": "of the record"}
    return {"seed": str(asked.seed or 0), "image": str(asked.number)}


def lines_of(
    texts: Sequence[str], polygons: Sequence[Sequence[Sequence[float]]], colors: Sequence[Sequence[float]]
) -> str:
    """Say in JSON which texts are where, in pixels of the image, and in which colours if these are known."""
    lines = []
    for text, polygon, color in zip(texts, polygons, colors, strict=True):
        known = {"color": list(color)} if color and max(color) <= 255 else {}
        lines.append({"text": text, "polygon": [list(corner) for corner in polygon], **known})
    return canonical_json(lines).decode().strip()
