"""How a batch comes from a worker: its tensors lie in anonymous memory, of which only the descriptor is sent.

torch itself would put every tensor into a file of /dev/shm, which has 64 MB in a container of Docker or
Kubernetes, less than the batches that a few workers hold ready; a write beyond it ends the worker, or leaves
training waiting for ever. Anonymous memory (memfd) counts as the process's own and has no such limit.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64
_Placed = tuple[int, tuple[int, ...], torch.dtype]
"""Offset, shape, dtype."""


class Parcel:
    """An object with tensors in it that arrives at another process as the object itself."""

    def __init__(self, content: Any) -> None:
        self._content = content

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        packed = io.BytesIO()
        packer = _Packer(packed)
        packer.dump(self._content)
        descriptor = os.memfd_create("batch", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, max(packer.end, 1))
            for offset, tensor in packer.tensors:
                _write(descriptor, memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data), offset)
            return _unpack, (DupFd(descriptor), packed.getvalue())
        finally:
            os.close(descriptor)  # DupFd keeps one of its own until the receiver has fetched it


class _Packer(pickle.Pickler):
    """Leaves the bytes of tensors out and notes where they are to lie."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[int, Tensor]] = []
        self.end = 0

    def persistent_id(self, obj: Any) -> _Placed | None:
        if not isinstance(obj, Tensor):
            return None
        tensor = obj.detach().contiguous()
        offset = -(-self.end // _ALIGNMENT) * _ALIGNMENT
        self.tensors.append((offset, tensor))
        self.end = offset + tensor.nbytes
        return offset, tuple(tensor.shape), tensor.dtype


class _Unpacker(pickle.Unpickler):
    """Makes tensors of the memory that they lie in."""

    def __init__(self, packed: bytes, memory: mmap.mmap) -> None:
        super().__init__(io.BytesIO(packed))
        self._memory = memory

    def persistent_load(self, pid: _Placed) -> Tensor:
        offset, shape, dtype = pid
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).reshape(shape)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _unpack(sent: Any, packed: bytes) -> Any:
    descriptor = sent.detach()
    try:
        memory = mmap.mmap(descriptor, 0)  # the tensors hold it; it goes with the last of them
    finally:
        os.close(descriptor)
    return _Unpacker(packed, memory).load()
