"""Handing a student on: LoRA files for diffusers and for kohya's tools, and a merged AnyText2 checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from common.anytext2.checkpoint import export_state, write_checkpoint
from common.anytext2.checkpoint_file import CheckpointFile
from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.errors import DataError
from common.files import write_bytes_atomic
from stage2_student.student.adapter import Card, attach_adapter, load_tensors, read_card
from stage2_student.student.lora import adapted_layers, merge
from stage2_student.student.student import Student, load_base

FORMATS = ("diffusers", "kohya", "merged")
KOHYA_PREFIXES = {"unet": "lora_unet", "writenet": "lora_controlnet"}
"""kohya's tools know the first; files with the second are for tools that know WriteNet."""


def export_diffusers(adapter: Path, out: Path) -> int:
    """Write one file as diffusers' LoRA loaders read it.

    Keys are `unet.NAME.lora_A.weight` and `unet.NAME.lora_B.weight` (and `writenet. ...`). alpha / rank is
    multiplied into B, so that the file means the same to loaders that take alpha to be the rank.

    Args:
        adapter: the adapter's folder.
        out: a .safetensors file.

    Returns:
        The number of adapted modules.

    Raises:
        DataError: the adapter is unreadable.
    """
    card, tensors = read_card(adapter), load_tensors(adapter)
    scale = card.alpha / card.rank
    scaled = {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in tensors.items()}
    _write(out, scaled, card)
    return len(tensors) // 2


def export_kohya(adapter: Path, out: Path) -> int:
    """Write one file in the naming of kohya's sd-scripts.

    Keys are `lora_unet_NAME.lora_down.weight`, `.lora_up.weight` and `.alpha`, NAME with `_` for `.`.

    Args:
        adapter: the adapter's folder.
        out: a .safetensors file.

    Returns:
        The number of adapted modules.

    Raises:
        DataError: the adapter is unreadable.
    """
    card, renamed = read_card(adapter), {}
    for name, tensor in load_tensors(adapter).items():
        part, _, rest = name.partition(".")
        module, _, side = rest.removesuffix(".weight").rpartition(".")
        key = f"{KOHYA_PREFIXES[part]}_{module.replace('.', '_')}"
        renamed[f"{key}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = tensor
        renamed[f"{key}.alpha"] = torch.tensor(card.alpha)
    _write(out, renamed, card)
    return len(renamed) // 3


def export_merged(config: Config, adapter: Path, out: Path) -> int:
    """Write an AnyText2 checkpoint with the student in place of the teacher, W + (alpha / rank) B A.

    Keys, shapes and types are the checkpoint's own; tensors that are not adapted are copied bit for bit. It is to
    be sampled without guidance, at the student's timesteps.

    Args:
        config: its [model] section names the checkpoint that the student was trained on.
        adapter: the adapter's folder.
        out: a .safetensors or .ckpt file.

    Returns:
        The number of adapted modules.

    Raises:
        DataError: the adapter is unreadable, or belongs to another base.
    """
    student, path = load_base(config, torch.float32, "cpu")
    attach_adapter(student, adapter, fingerprint(path, "base"))
    count = sum(len(adapted_layers(model)) for model in (student.unet, student.writenet))
    merged = _merge(student, config)
    file = CheckpointFile(path)
    if out.resolve() in {used.resolve() for used in file.files}:
        raise DataError(f"{out} is the checkpoint that the student was trained on; give another --out")
    tensors = {key: file.read(key) for key in file.sorted_keys()}
    for key, tensor in merged.items():
        tensors[key] = tensor.to(tensors[key].dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(out, tensors)
    return count


def _merge(student: Student, config: Config) -> dict[str, Tensor]:
    """Merge the adapters and return the changed tensors, by the checkpoint's keys."""
    network, changed = config.load_network(), {}
    parts: dict[str, nn.Module] = {"unet": student.unet, "writenet": student.writenet}
    for part, model in parts.items():
        merged = merge(model)
        state = export_state(model, part, network)
        names = dict(zip(model.state_dict(), state, strict=True))  # our name to the checkpoint's key
        for name in merged:
            key = names[f"{name}.weight"]
            changed[key] = state[key]
    return changed


def _write(out: Path, tensors: Mapping[str, Tensor], card: Card) -> None:
    """Write a LoRA file whose metadata says how to sample."""
    metadata = {
        "format": "pt",
        "sampler": card.sampler,
        "num_inference_steps": str(card.num_steps),
        "timesteps": json.dumps(list(card.timesteps)),
        "guidance_scale": "1.0",
        "rank": str(card.rank),
        "base_fingerprint": card.base_fingerprint,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes_atomic(out, save(contiguous, metadata=metadata))
