"""Dataclasses that hold tensors, with one change made to all of them; and what is hashed of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from common.files import canonical_json


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tensors:
    """Base of dataclasses whose tensors are changed together, those in others and in dictionaries too."""

    def map(self, change: Callable[..., Tensor], *others: Self) -> Self:
        """Return a copy with every tensor changed; what is no tensor stays.

        Args:
            change: called with a tensor, and with the tensors that stand at its place in `others`.
            *others: hold tensors wherever this one does.
        """
        named = {field.name: [getattr(value, field.name) for value in (self, *others)] for field in fields(self)}
        return replace(self, **{name: _map(change, *values) for name, values in named.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move to a device, and to a type if one is given; masks of booleans keep theirs."""
        return self.map(lambda tensor: tensor.to(device, None if tensor.dtype == torch.bool else dtype))

    def send(self, device: torch.device | str) -> Self:
        """Move to a device, without waiting for the copy to a GPU where this lies in page-locked memory."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Copy to page-locked memory, from which copies to a GPU run beside its work."""
        return self.map(Tensor.pin_memory)


def _map(change: Callable[..., Tensor], *values: Any) -> Any:
    match values[0]:
        case Tensor():
            return change(*values)
        case Tensors():
            return values[0].map(change, *values[1:])
        case dict():
            return {key: _map(change, *(value[key] for value in values)) for key in values[0]}
    return values[0]


def spell(name: str, tensor: Tensor) -> Iterator[bytes | memoryview]:
    """Yield what identifies a named tensor, to be hashed: name, dtype and shape as JSON, then its bytes."""
    tensor = tensor.detach().cpu().contiguous()
    yield canonical_json([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
    yield tensor.reshape(-1).view(torch.uint8).numpy().data
