"""The students that a student was started from, as its card names them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.tensors import spell


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """A student that another one was started from."""

    objective: str
    """Of its training, e.g. "phased"."""
    timesteps: tuple[int, ...]
    """t at which it calls the network; as many as it has phases."""
    step: int
    """Optimizer steps of its own training; those of its ancestors are theirs."""
    set_hash: str
    """Of the shards that it was trained on."""
    adapter_sha256: str
    """Of its weights as they were taken over, see `hash_adapter`."""

    @property
    def num_phases(self) -> int:
        """M."""
        return len(self.timesteps)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Ancestor:
        """Read what a card says of an ancestor.

        Raises:
            TypeError: it says too little or too much.
            KeyError: likewise.
        """
        return Ancestor(**{**values, "timesteps": tuple(int(t) for t in values["timesteps"])})


def hash_adapter(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of an adapter's weights over sorted (name, dtype, shape, bytes), whatever file has them.

    Args:
        tensors: by the names of `Student.trainable`.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        for part in spell(name, tensors[name]):
            found.update(part)
    return found.hexdigest()
