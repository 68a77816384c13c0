"""The rule that fills a network of any size with reproducible weights, key by key (see golden/README.md)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from common.anytext2.checkpoint import schedule_buffers
from common.anytext2.checkpoint_file import CheckpointFile
from common.anytext2.keys import POSITION_IDS_KEY, SCHEDULE_KEYS


def rule_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor that the rule puts under a key."""
    if key in SCHEDULE_KEYS:
        return schedule_buffers()[key]
    if key == POSITION_IDS_KEY:
        return torch.arange(shape[-1]).expand(shape)
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    x = torch.randn(shape, generator=generator, dtype=torch.float32)
    if key.endswith("running_var"):
        return 1 + 0.1 * x.abs()
    if len(shape) <= 1:
        return 1 + 0.02 * x if key.endswith("weight") else 0.02 * x
    if "embedding.weight" in key:
        return 0.02 * x
    return x / math.sqrt(math.prod(shape[1:]))


class RuleCheckpoint(CheckpointFile):
    """A checkpoint that is computed tensor by tensor instead of read, so that a full-size one fits in memory."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = Path("golden-rule")
        self.files = []
        self.shapes = {key: tuple(shape) for key, shape in shapes.items()}

    def read(self, key: str) -> Tensor:
        return rule_tensor(key, self.shapes[key])
