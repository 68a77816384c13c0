"""Loading the network's parts from checkpoints with AnyText2's keys, and saving them back."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.anytext2.checkpoint_file import CheckpointFile
from common.anytext2.config import NetworkConfig
from common.anytext2.denoiser import Denoiser
from common.anytext2.keys import POSITION_IDS_KEY, SCHEDULE_KEYS, Entry, key_table, part_of
from common.anytext2.unet import UNet
from common.anytext2.vae import VAE
from common.anytext2.writenet import WriteNet
from common.errors import DataError
from common.faults import naming
from common.files import fsync_dir, require_suffix, temporary_path
from common.grids import NUM_TRAIN_TIMESTEPS
from common.schedule import make_alphas_cumprod

ModuleT = TypeVar("ModuleT", bound=nn.Module)
METADATA_KEY = "metadata"
"""Of a .ckpt, beside its "state_dict"."""


def load_part(
    build: Callable[[NetworkConfig], ModuleT],
    part: str,
    config: NetworkConfig,
    checkpoint: Path | CheckpointFile,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ModuleT:
    """Load one part, frozen and in eval mode; nothing else of the checkpoint is read.

    Args:
        build: makes the module; called under the meta device, so it allocates nothing.
        part: a key of `keys.PREFIXES`.
        config: the network's sizes.
        checkpoint: a path, or a checkpoint already opened.
        dtype: of the floating-point tensors.
        device: where they go.

    Raises:
        DataError: the checkpoint is unreadable, or a key is missing, unknown or of another shape.
    """
    file = checkpoint if isinstance(checkpoint, CheckpointFile) else CheckpointFile(checkpoint)
    with torch.device("meta"):
        module = build(config)
    expected = module.state_dict()
    table = key_table(part, expected, config)
    shapes = {entry.key: entry.upstream_shape(expected[name].shape) for name, entry in table.items()}
    check_keys(file, shapes, parts=[part])
    state = {name: _convert(file.read(entry.key), expected[name], dtype, device) for name, entry in table.items()}
    module.load_state_dict(state, assign=True)
    for owner in module.modules():  # buffers outside the state dict: CLIP's position_ids are the only one
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:
                if name != "position_ids":
                    raise ValueError(f"buffer {name} is not in the checkpoint and has no rule")
                setattr(owner, name, torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
    return module.requires_grad_(False).eval()


load_unet = partial(load_part, UNet, "unet")
load_writenet = partial(load_part, WriteNet, "writenet")
load_vae = partial(load_part, VAE, "vae")
"""Take (config, checkpoint, dtype, device); see `load_part`."""


def load_denoiser(
    config: NetworkConfig,
    checkpoint: Path | CheckpointFile,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Denoiser:
    """Load UNet and WriteNet; see `load_part`."""
    unet = load_unet(config, checkpoint, dtype, device)
    return Denoiser(unet, load_writenet(config, checkpoint, dtype, device)).eval()


def _convert(tensor: Tensor, expected: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    target = dtype if expected.is_floating_point() else expected.dtype
    return tensor.reshape(expected.shape).to(device=device, dtype=target)


def check_keys(file: CheckpointFile, shapes: Mapping[str, tuple[int, ...]], parts: Iterable[str]) -> None:
    """Account for every key of a checkpoint.

    Args:
        file: the checkpoint.
        shapes: keys and shapes that the asked-for parts need.
        parts: names of those parts ("schedule" for the schedule's buffers). Keys of known other parts are
            left alone, and may be absent.

    Raises:
        DataError: names the first key that is missing, unknown, or of another shape.
    """
    asked = set(parts)
    for key in file.sorted_keys():
        part = part_of(key)
        if part is None or (part in asked and key not in shapes and key != POSITION_IDS_KEY):
            near = difflib.get_close_matches(key, shapes, n=1, cutoff=0.8)
            hint = f"; nearest known: {near[0]}" if near else ""
            raise DataError(
                f"checkpoint {file.path}: unknown key {key}{hint}; is it of another network than the "
                "configuration's model.network?"
            )
    for key, shape in shapes.items():
        if key not in file.shapes:
            raise DataError(
                f"checkpoint {file.path}: missing key {key}; is it of another network than the "
                "configuration's model.network?"
            )
        if file.shapes[key] != shape:
            raise DataError(
                f"checkpoint {file.path}: {key} has shape {file.shapes[key]}, expected {shape}; is it of "
                "another network than the configuration's model.network?"
            )


def export_state(module: nn.Module, part: str, config: NetworkConfig) -> dict[str, Tensor]:
    """Return a part's tensors under upstream's keys and shapes, the inverse of loading."""
    state = module.state_dict()
    table: dict[str, Entry] = key_table(part, state, config)
    return {e.key: state[name].detach().reshape(e.upstream_shape(state[name].shape)) for name, e in table.items()}


def schedule_buffers() -> dict[str, Tensor]:
    """Return the 13 schedule buffers of a checkpoint, float32 (1000,) each.

    Source: Ho et al. 2020, equations 6 and 7 (posterior), in the original LDM's names.
    """
    cumulative = make_alphas_cumprod().double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
    alphas = cumulative / before
    betas = 1 - alphas
    variance = betas * (1 - before) / (1 - cumulative)
    values = (
        betas,
        cumulative,
        before,
        cumulative.sqrt(),
        (1 - cumulative).sqrt(),
        (1 - cumulative).log(),
        cumulative.rsqrt(),
        (1 / cumulative - 1).sqrt(),
        variance,
        variance.clamp(min=1e-20).log(),
        betas * before.sqrt() / (1 - cumulative),
        (1 - before) * alphas.sqrt() / (1 - cumulative),
        torch.zeros_like(betas),
    )
    return dict(zip(SCHEDULE_KEYS, (value.float() for value in values), strict=True))


def _rounding(dtype: torch.dtype) -> float:
    """Return how far rounding moves numbers up to 1: whole checkpoints are cast to half, their schedule too."""
    coarse = dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize
    return torch.finfo(dtype).eps if coarse else 0.0


def check_schedule(file: CheckpointFile) -> None:
    """Check that a checkpoint was trained on the schedule that we solve on, which is not read from it.

    Raises:
        DataError: its buffers are missing or differ.
    """
    check_keys(file, dict.fromkeys(SCHEDULE_KEYS, (NUM_TRAIN_TIMESTEPS,)), parts=["schedule"])
    stored = file.read("alphas_cumprod")
    difference = (stored.double() - make_alphas_cumprod().double()).abs().max()
    if not float(difference) < 1e-4 + _rounding(stored.dtype):
        raise DataError(
            f"checkpoint {file.path}: alphas_cumprod differs by {float(difference):.2g} from SD1.5's noise "
            "schedule, the only one that is supported"
        )


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors under upstream's keys, as .ckpt or .safetensors by the name's suffix.

    The file appears under its name only when complete and on disk.

    Args:
        path: the file.
        tensors: all of them.
        metadata: what the file says of itself; of a .safetensors in its header, of a .ckpt under METADATA_KEY.

    Raises:
        UsageError: the suffix is neither.
    """
    require_suffix(path, ".safetensors", ".ckpt", option="checkpoint")
    temporary = temporary_path(path)
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        with naming(path, temporary=temporary):
            if path.suffix.lower() == ".safetensors":
                save_file(plain, temporary, metadata={"format": "pt", **(metadata or {})})
            else:
                said = {} if metadata is None else {METADATA_KEY: dict(metadata)}
                with temporary.open("wb") as file:  # on a path torch.save keeps the system's error to itself
                    torch.save({"state_dict": plain, **said}, file)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)  # safetensors makes it private
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)
