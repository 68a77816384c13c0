"""Random choices keyed by what they are for, never by when or where they are made.

Every choice derives from a SHA-256 of its key, so that it does not depend on batch, task, worker or process.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: str | int) -> int:
    """Hash a key to a seed.

    Args:
        parts: the key, e.g. `(seed, input_id, "caption phrase")`. `1` and `"1"` are different keys.

    Returns:
        An integer in [0, 2**63).
    """
    key = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def rng(*parts: str | int) -> random.Random:
    """Return Python's generator, seeded by the key."""
    return random.Random(derive_seed(*parts))


def generator(*parts: str | int) -> torch.Generator:
    """Return a CPU torch generator seeded by the key; draw on the CPU and move, so that devices agree."""
    import torch

    return torch.Generator().manual_seed(derive_seed(*parts))
