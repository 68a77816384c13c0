"""LoRA files for other tools: how their tensors are named, and what they say of themselves; and the way back.

| layout | keys | alpha |
| --- | --- | --- |
| diffusers | `unet.NAME.lora_A.weight`, `.lora_B.weight`, and `writenet. ...` | in B, so that it is the rank |
| kohya | `lora_unet_NAME.lora_down.weight`, `.lora_up.weight`, `.alpha`, NAME with `_` for `.` | as trained |
| merged | a checkpoint's own | in the weights |

diffusers takes a file for one of kohya's only if every key is the UNet's (or a text encoder's); with any other in
it, it loads nothing. WriteNet's adapters are therefore a file of their own, named in the metadata of the UNet's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.anytext2.checkpoint import METADATA_KEY
from common.anytext2.unet import ATTNX_ALIASES
from common.errors import DataError, reason
from common.faults import raise_disk_fault
from common.files import sha256_file

KOHYA_PREFIXES = {"unet": "lora_unet", "writenet": "lora_controlnet"}
"""kohya's tools know the first; files with the second are for tools that know WriteNet."""
_SIDES = {"lora_A": "lora_down", "lora_B": "lora_up"}

Metadata = dict[str, str]
"""Of a file, as safetensors has it."""


def to_diffusers(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Name an adapter's tensors (see `Student.trainable`) as diffusers' loaders do.

    Args:
        tensors: of all parts.
        scale: alpha / rank; multiplied into B, for loaders that take alpha to be the rank.
    """
    return {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in tensors.items()}


def to_kohya(tensors: Mapping[str, Tensor], part: str, alpha: float) -> tuple[dict[str, Tensor], Metadata]:
    """Name one part's tensors as kohya's sd-scripts do.

    Returns:
        The tensors, and what is needed to undo it: an underscore does not say whether it was a dot.
    """
    renamed, modules = {}, []
    for name, tensor in tensors.items():
        module, _, side = name.removesuffix(".weight").rpartition(".")
        key = kohya_name(part, module)
        renamed[f"{key}.{_SIDES[side]}.weight"] = tensor
        renamed[f"{key}.alpha"] = torch.tensor(alpha)
        modules.append(module)
    return renamed, {"part": part, "modules": json.dumps(list(dict.fromkeys(modules)))}


def kohya_name(part: str, module: str) -> str:
    """Return kohya's name of a module; AttnX goes by one that diffusers' converter leaves whole."""
    for alias, name in ATTNX_ALIASES.items():
        module = module.replace(f".{name}.", f".{alias}.")
    return f"{KOHYA_PREFIXES[part]}_{module.replace('.', '_')}"


def read_metadata(path: Path) -> Metadata:
    """Read what an exported file says of itself; empty if it says nothing.

    Raises:
        DataError: it is no readable .safetensors or .ckpt.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, "pt") as file:
                return dict(file.metadata() or {})
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError) as error:
        raise_disk_fault(error, path)
        raise DataError(f"{path}: unreadable ({reason(error)})") from None
    except Exception as error:  # torch.load raises almost anything on other files
        raise_disk_fault(error, path)
        raise DataError(
            f"{path}: neither .safetensors nor .ckpt ({reason(error)}); expected what export wrote"
        ) from None
    found = loaded.get(METADATA_KEY) if isinstance(loaded, dict) else None
    return dict(found) if isinstance(found, dict) else {}


def read_tensors(path: Path, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Read an exported LoRA's tensors, by the names of `Student.trainable`.

    Args:
        path: the file; of kohya's two the UNet's.
        metadata: of that file.

    Raises:
        DataError: it is unreadable, merged, or one of two of which the other is missing or not its own.
    """
    layout = metadata.get("layout")
    if layout == "diffusers":
        return _read(path)
    if layout != "kohya":
        raise DataError(
            f"{path}: received a merged checkpoint, expected an adapter; give the run, or an exported LoRA"
        )
    if metadata.get("part") != "unet":
        raise DataError(
            f"{path}: WriteNet's half of an adapter, expected the UNet's; give the file that was exported with it"
        )
    tensors = _undo_kohya(path, metadata)
    if name := metadata.get("writenet_file"):
        other = path.with_name(name)
        if not other.is_file():
            raise DataError(f"{path}: WriteNet's half is missing, expected {name} beside it; put it there")
        if sha256_file(other) != metadata.get("writenet_sha256"):
            raise DataError(f"{path}: {name} beside it is of another export; expected the one it was written with")
        tensors |= _undo_kohya(other, read_metadata(other))
    return tensors


def _undo_kohya(path: Path, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    stored, tensors = _read(path), {}
    try:
        part, modules = metadata["part"], json.loads(metadata["modules"])
        for module in modules:
            for side, kohyas in _SIDES.items():
                tensors[f"{part}.{module}.{side}.weight"] = stored[f"{kohya_name(part, module)}.{kohyas}.weight"]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: lacks {reason(error)}; was it changed since it was exported?") from None
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    try:
        opened: Any = safe_open(path, "pt")
        with opened as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise_disk_fault(error, path)
        raise DataError(f"{path}: unreadable ({reason(error)})") from None
