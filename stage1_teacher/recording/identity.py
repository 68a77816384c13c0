"""What decides a set of records, and what it was made with.

The identity holds everything that changes a record's values and nothing else: two runs with equal identities may
write to one set. No paths: the same files in another place make the same set.
"""

from __future__ import annotations

import hashlib
import platform
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import features

from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.files import read_bytes
from common.grids import alphas_cumprod_table, trailing_steps
from common.machine import describe_device, installed_versions
from common.sections import ModelConfig, PrecomputeConfig
from stage1_teacher.inputs.fonts import font_sha256, text_layout
from stage1_teacher.rendering.settings import RenderSettings

if TYPE_CHECKING:
    import torch

    from stage1_teacher.teacher.student_states import StudentStates

RECIPE = 1
"""Version of how inputs are rendered, captioned and solved; raised with every change that alters a record."""

_NOT_IDENTITY = {"ignore_fields", "max_failures", "render_workers"}
"""Settings of `inputs` and `precompute` that change no record."""
_ONLY_WHERE_SET = {"solve_size"}
"""Settings of `precompute` that came later: sets begun before go on, for they are there only where they matter."""
_OTHERWISE = {"font", "fonts", "fallback_fonts", "font_hint_prob", "frame"}
"""Settings of `inputs` that the identity holds elsewhere, fonts by their content, or only where they are set."""
_PACKAGES = (
    "diffusers",
    "numpy",
    "opencc-python-reimplemented",
    "opencv-python-headless",
    "pillow",
    "safetensors",
    "torch",
    "transformers",
)
_TOKENIZER_FILES = ("vocab.json", "merges.txt")


def build_identity(
    config: Config, settings: RenderSettings, student: StudentStates | None = None
) -> dict[str, Any]:
    """Collect what decides the records.

    Args:
        config: model, teacher, inputs, precompute and shards are used.
        settings: how inputs are rendered.
        student: whose states are recorded, if any.

    Returns:
        JSON values. `timesteps` are those of the stored called states, empty for noised data.

    Raises:
        UsageError: the configuration names no network, checkpoint or tokenizer.
        DataError: one of them is missing or unreadable.
    """
    checkpoint = config.find_checkpoint()
    inputs = config.inputs.model_dump(mode="json", exclude=_NOT_IDENTITY | _OTHERWISE)
    frame = {"frame": config.inputs.frame} if config.inputs.frame else {}
    grid = trailing_steps(config.precompute.solver_steps).tolist()
    timesteps = grid[:: config.precompute.record_every] if config.precompute.source == "rollout" else []
    return {
        "recipe": RECIPE,
        "teacher_fingerprint": fingerprint(checkpoint, "teacher"),
        "base_fingerprint": fingerprint(checkpoint, "base"),
        "tokenizer_sha256": _hash_tokenizer(config.resolve(config.model.clip, "model.clip")),
        "network": config.load_network().model_dump(mode="json"),
        "config": {  # under the names that these keys had first: sets begun before go on
            "model": {"dtype": config.model.dtype},
            "teacher": {**config.teacher.model_dump(), "font_hint_prob": config.inputs.font_hint_prob},
            "precompute": {**_describe_solves(config.precompute), **inputs, **frame},
            "shards": {"samples_per_shard": config.shards.samples_per_shard},
        },
        "fonts": describe_fonts(settings),
        "text_layout": text_layout(),
        "dtype": "float16",
        "solver": {"name": "ddim", "timesteps": grid, "alphas_cumprod_end": 1.0},
        "timesteps": timesteps if student is None else student.recorded_timesteps,
        **({} if student is None else {"student": dict(student.description)}),
        "alphas_cumprod": alphas_cumprod_table().tolist(),
    }


def _describe_solves(settings: PrecomputeConfig) -> dict[str, Any]:
    solves = settings.side_by_side
    return {
        **settings.model_dump(exclude=_NOT_IDENTITY | _ONLY_WHERE_SET),
        **({} if solves == settings.batch_size else {"solve_size": solves}),
    }


def describe_fonts(settings: RenderSettings, digits: int = 64) -> dict[str, Any]:
    """Return what fonts count as: their files' hashes, the first `digits` of each.

    Fallbacks are there only where there are any, so that sets begun before there were go on.
    """
    fallbacks = [font_sha256(path)[:digits] for path in settings.fallback_fonts]
    return {
        "default": font_sha256(settings.font)[:digits],
        "named": {name: font_sha256(path)[:digits] for name, path in settings.fonts.items()},
        **({"fallback": fallbacks} if fallbacks else {}),
    }


def _hash_tokenizer(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        path = folder / name
        digest.update(read_bytes(path) if path.is_file() else b"")  # loading it says what is wrong
    return digest.hexdigest()


def describe_machine(device: torch.device, model: ModelConfig) -> dict[str, Any]:
    """Return what two runs must share to write the same bytes: device, versions, what [model] does for speed."""
    import torch

    versions = installed_versions(_PACKAGES)
    return {
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        **{key: True for key in ("compile", "channels_last") if getattr(model, key)},
        "python": platform.python_version(),
        "packages": {name: versions.get(name, "none") for name in _PACKAGES},
        "freetype": features.version("freetype2") or "",
    }


def describe_run(device: torch.device, model: ModelConfig) -> dict[str, Any]:
    """Return `describe_machine` with host and time, for the manifest."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {**describe_machine(device, model), "host": socket.gethostname(), "created": now}
