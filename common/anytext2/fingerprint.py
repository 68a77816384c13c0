"""A checkpoint's identity, whatever its file format."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.anytext2.keys import POSITION_IDS_KEY, PREFIXES
from common.files import canonical_json, write_bytes_atomic

if TYPE_CHECKING:
    from common.anytext2.checkpoint_file import CheckpointFile

logger = logging.getLogger(__name__)

Parts = Literal["teacher", "base"]
BASE_PREFIXES = (PREFIXES["unet"], PREFIXES["writenet"])
VERSION = 1
"""Of the hash's definition."""


def fingerprint(checkpoint: Path, parts: Parts) -> str:
    """Return a SHA-256 over sorted (key, dtype, shape, bytes).

    Both hashes are computed in one pass and kept beside the file (`NAME.fingerprint.json`), valid while its size
    and modification time stay what they were.

    Args:
        checkpoint: a .ckpt, a .safetensors, or a folder of .safetensors.
        parts: "teacher" (every key) or "base" (the student's: UNet and WriteNet).

    Raises:
        DataError: the checkpoint is missing or unreadable.
    """
    files = sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    cache = checkpoint.with_name(checkpoint.name + ".fingerprint.json")
    found = _read_cache(cache, _stamp(files)) if all(file.exists() for file in files) else None
    if found is None:
        from common.anytext2.checkpoint_file import CheckpointFile  # brings torch, which the cache does without

        file = CheckpointFile(checkpoint)
        stamp = _stamp(file.files)
        found = _compute(file)
        if _stamp(file.files) == stamp:
            try:
                write_bytes_atomic(cache, canonical_json({"stamp": stamp, **found}))
            except OSError as error:
                logger.debug("fingerprint cache %s not written: %s", cache, error)
    return found[parts]


def _stamp(files: list[Path]) -> list[list[Any]]:
    stats = [(path.name, path.stat()) for path in files]
    return [["version", VERSION], *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def _read_cache(cache: Path, stamp: list[list[Any]]) -> dict[str, str] | None:
    try:
        kept = json.loads(cache.read_bytes())
        hashes = {name: kept[name] for name in ("teacher", "base")}
        valid = kept["stamp"] == stamp and all(isinstance(h, str) and len(h) == 64 for h in hashes.values())
        return hashes if valid else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _compute(file: CheckpointFile) -> dict[str, str]:
    import torch

    teacher, base = hashlib.sha256(), hashlib.sha256()
    for key in file.sorted_keys():
        if key == POSITION_IDS_KEY:
            continue  # a constant that only some files hold
        tensor = file.read(key).contiguous()
        header = canonical_json([key, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        for target in (teacher, base) if key.startswith(BASE_PREFIXES) else (teacher,):
            target.update(header)
            target.update(content)
    return {"teacher": teacher.hexdigest(), "base": base.hexdigest()}
