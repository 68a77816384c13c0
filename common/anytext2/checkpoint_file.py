"""Reading checkpoints tensor by tensor: .ckpt, .safetensors, or a folder of .safetensors files."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import DataError, reason
from common.faults import raise_disk_fault
from common.files import is_lfs_pointer

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the types that a checkpoint may hold."""

_FOREIGN_OBJECT = re.compile(r"GLOBAL ([\w.]+)")
"""What torch says of a class that it does not load, e.g. one of Lightning's."""


class CheckpointFile:
    """A checkpoint whose names, shapes and types are known, and whose tensors are read one at a time.

    Nothing but the headers is in memory; a tensor that is read is a copy of its own, so that the file may be
    replaced afterwards.
    """

    def __init__(self, path: Path) -> None:
        """Read the headers.

        Raises:
            DataError: there is no such file or folder, or it is not a readable checkpoint.
        """
        self.path = path
        self.files: list[Path] = [path]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._where: dict[str, Any] = {}
        self._tensors: Mapping[str, Tensor] | None = None
        if path.is_dir():
            self.files = sorted(path.glob("*.safetensors"))
            if not self.files:
                raise DataError(f"checkpoint folder {path} holds no .safetensors file")
        elif not path.exists():
            raise DataError(f"checkpoint {path}: no such file or folder")
        for file in filter(is_lfs_pointer, self.files):
            raise DataError(
                f"checkpoint {file} is git-lfs's pointer to the checkpoint, a text of {file.stat().st_size} bytes;"
                " fetch the file itself: git lfs pull"
            )
        if path.is_dir() or path.suffix == ".safetensors":
            for file in self.files:
                self._index_safetensors(file)
        else:
            self._tensors = _open_pickle(path)
            self.shapes = {key: tuple(value.shape) for key, value in self._tensors.items()}
            self.dtypes = {key: value.dtype for key, value in self._tensors.items()}

    def _index_safetensors(self, file: Path) -> None:
        try:
            opened: Any = safe_open(file, framework="pt")
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                header = opened.get_slice(key)
                if key in self._where:
                    raise DataError(f"checkpoint folder {self.path}: {key} is in more than one file")
                self._where[key] = opened
                self.shapes[key] = tuple(header.get_shape())
                self.dtypes[key] = DTYPES[header.get_dtype()]
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise_disk_fault(error, file)
            raise DataError(f"checkpoint {file} is not a readable .safetensors file: {reason(error)}") from None

    def sorted_keys(self) -> list[str]:
        """Return all keys, sorted."""
        return sorted(self.shapes)

    def read(self, key: str) -> Tensor:
        """Read one tensor.

        Raises:
            DataError: the file is cut short.
            KeyError: there is no such key.
        """
        if self._tensors is not None:
            return self._tensors[key].clone()
        try:
            tensor: Tensor = self._where[key].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise_disk_fault(error, self.path)
            raise DataError(f"checkpoint {self.path}: cannot read {key}: {reason(error)}") from None
        return tensor.clone()


def _keep_weights(path: Path) -> str:
    """Return the command that takes the weights out of a training checkpoint."""
    weights = f"torch.load('{path}', weights_only=False)['state_dict']"
    return f"python -c \"import torch; torch.save({{'state_dict': {weights}}}, 'weights.ckpt')\""


def _open_pickle(path: Path) -> Mapping[str, Tensor]:
    """Map a .ckpt into memory; no code in it is run."""
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        if (other := _FOREIGN_OBJECT.search(str(error))) is None:
            raise DataError(f"checkpoint {path} is not a readable .ckpt file of plain tensors") from None
        raise DataError(
            f"checkpoint {path} holds other objects than tensors ({other[1]}), which are not loaded, as that runs"
            f" code of the file; where you trust it, save its weights alone: {_keep_weights(path)}"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise_disk_fault(error, path)
        raise DataError(
            f"checkpoint {path} is not a readable .ckpt file of plain tensors: {reason(error)}"
        ) from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict):
        raise DataError(f"checkpoint {path}: received a {type(state).__name__}, expected a table of tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise DataError(f"checkpoint {path}: entry {key!r} is a {type(value).__name__}, expected a tensor")
    return state
