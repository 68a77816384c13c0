"""A checkpoint of a network of any size with the rule's weights, key by key (see golden/README.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bench.rule_weights import rule_tensor
from common.anytext2.checkpoint_file import CheckpointFile

__all__ = ["RuleCheckpoint", "rule_tensor"]


class RuleCheckpoint(CheckpointFile):
    """A checkpoint that is computed tensor by tensor instead of read, so that a full-size one fits in memory."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = Path("golden-rule")
        self.files = []
        self.shapes = {key: tuple(shape) for key, shape in shapes.items()}

    def read(self, key: str) -> Tensor:
        return rule_tensor(key, self.shapes[key])
