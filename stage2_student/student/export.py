"""Handing a student on: LoRA files for diffusers and for kohya's tools, and a merged AnyText2 checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from common.anytext2.checkpoint import export_state, write_checkpoint
from common.anytext2.checkpoint_file import CheckpointFile
from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.errors import DataError, UsageError
from common.files import require_suffix, sha256_file, write_bytes_atomic
from stage2_student.student.adapter import (
    Card,
    adapter_files,
    attach_adapter,
    find_adapter,
    load_tensors,
    read_card,
)
from stage2_student.student.exported import Metadata, to_diffusers, to_kohya
from stage2_student.student.lora import adapted_layers, merge
from stage2_student.student.student import Student, load_base, split_parts

FORMATS = ("diffusers", "kohya", "merged")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written."""

    files: tuple[Path, ...]
    """The one that was asked for, then what belongs to it."""
    modules: int
    """That are adapted."""
    card: Card
    """How to sample it."""


def export(config: Config, adapter: Path, layout: str, out: Path) -> Exported:
    """Hand a student on.

    Args:
        config: for `merged`, its [model] section.
        adapter: a run's folder, a checkpoint, an adapter's folder, or an exported LoRA.
        layout: one of FORMATS.
        out: a .safetensors file; of `merged` or a .ckpt.

    Raises:
        UsageError: the name of `out` says another format.
        DataError: there is no adapter, or it is unreadable, or belongs to another base.
    """
    require_suffix(out, ".safetensors", *([".ckpt"] if layout == "merged" else []))
    folder = find_adapter(adapter)
    if out.resolve() in {path.resolve() for path in adapter_files(folder).values()}:
        raise UsageError(f"--out {out}: is the adapter itself; give another --out")
    if layout == "merged":
        return export_merged(config, folder, out)
    return export_kohya(folder, out) if layout == "kohya" else export_diffusers(folder, out)


def export_diffusers(adapter: Path, out: Path) -> Exported:
    """Write one file as diffusers' LoRA loaders read it, see `exported`.

    Args:
        adapter: the adapter's folder.
        out: a .safetensors file.

    Raises:
        DataError: the adapter is unreadable.
    """
    card, tensors = read_card(adapter), load_tensors(adapter)
    _write(out, to_diffusers(tensors, card.alpha / card.rank), card.to_metadata("diffusers"))
    return Exported(files=(out,), modules=len(tensors) // 2, card=card)


def export_kohya(adapter: Path, out: Path) -> Exported:
    """Write the UNet's adapters as kohya's sd-scripts name them, and WriteNet's to `NAME_writenet.safetensors`.

    Args:
        adapter: the adapter's folder.
        out: a .safetensors file.

    Raises:
        DataError: the adapter is unreadable.
    """
    card, tensors = read_card(adapter), load_tensors(adapter)
    parts, files, metadata = split_parts(tensors), [out], card.to_metadata("kohya")
    link = {}
    if "writenet" in parts:
        other = out.with_name(f"{out.stem}_writenet.safetensors")
        renamed, said = to_kohya(parts["writenet"], "writenet", card.alpha)
        _write(other, renamed, metadata | said)
        link = {"writenet_file": other.name, "writenet_sha256": sha256_file(other)}
        files.append(other)
    renamed, said = to_kohya(parts["unet"], "unet", card.alpha)
    _write(out, renamed, metadata | said | link)
    return Exported(files=tuple(files), modules=len(tensors) // 2, card=card)


def export_merged(config: Config, adapter: Path, out: Path) -> Exported:
    """Write an AnyText2 checkpoint with the student in place of the teacher, W + (alpha / rank) B A.

    Keys, shapes and types are the checkpoint's own; tensors that are not adapted are copied bit for bit. It is to
    be sampled without guidance, at the student's timesteps.

    Args:
        config: its [model] section names the checkpoint that the student was trained on.
        adapter: the adapter's folder.
        out: a .safetensors or .ckpt file.

    Raises:
        DataError: the adapter is unreadable, or belongs to another base.
    """
    student, path = load_base(config, torch.float32, "cpu")
    card = attach_adapter(student, adapter, fingerprint(path, "base"))
    count = sum(len(adapted_layers(model)) for model in student.parts.values())
    merged = _merge(student, config)
    file = CheckpointFile(path)
    if out.resolve() in {used.resolve() for used in file.files}:
        raise DataError(f"{out} is the checkpoint that the student was trained on; give another --out")
    tensors = {key: file.read(key) for key in file.sorted_keys()}
    for key, tensor in merged.items():
        tensors[key] = tensor.to(tensors[key].dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(out, tensors, card.to_metadata("merged"))
    return Exported(files=(out,), modules=count, card=card)


def _merge(student: Student, config: Config) -> dict[str, Tensor]:
    """Merge the adapters and return the changed tensors, by the checkpoint's keys."""
    network, changed = config.load_network(), {}
    for part, model in student.parts.items():
        merged = merge(model)
        state = export_state(model, part, network)
        names = dict(zip(model.state_dict(), state, strict=True))  # our name to the checkpoint's key
        for name in merged:
            key = names[f"{name}.weight"]
            changed[key] = state[key]
    return changed


def _write(out: Path, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    """Write a LoRA file whose metadata says how to sample."""
    out.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes_atomic(out, save(contiguous, metadata={"format": "pt", **metadata}))
