"""Work on a GPU beside other work on it: a stream of one's own, and copies to the host that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from common.tensors import Tensors

T = TypeVar("T", bound=Tensors)


def own_stream(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Make a CUDA stream; returns what makes the context of a piece of work on it, in whatever thread.

    The stream begins after all that the caller's stream was given so far. Work is finished when its context is
    left. Whoever uses its tensors on another stream says so with `used_here`. On another device the context does
    nothing.
    """
    if device.type != "cuda":
        return nullcontext
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def within() -> Iterator[None]:
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):  # a new thread's is the first GPU
            yield
        stream.synchronize()

    return within


def used_here(values: T) -> T:
    """Keep the memory of another stream's tensors from being given away before this stream is through with it."""

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor

    return values.map(keep)


@dataclass(frozen=True, slots=True, eq=False)
class OnItsWay(Generic[T]):
    """Tensors whose copy to the host may not have arrived yet."""

    _values: T
    _arrived: Any
    """An event behind the copies; None if they are there."""

    def get(self) -> T:
        """Wait for the copies, on the CPU; other threads go on meanwhile."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values


def send_to_host(values: T, device: torch.device) -> OnItsWay[T]:
    """Begin to copy tensors of one device to the host, behind what their stream is doing; tensors there stay."""
    if device.type != "cuda":
        return OnItsWay(values.to("cpu"), None)

    def copy(tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    copies = values.map(copy)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(device))
    return OnItsWay(copies, arrived)
