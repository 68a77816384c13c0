"""Records side by side, as a training step takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.anytext2.conditioning import ConditioningBatch, Hints
from common.errors import DataError
from common.tensors import Tensors
from shards.records.record import Record
from shards.records.tensor_file import Array

_STACKED = ("text_context", "rollout_latents", "rollout_timesteps")
_HINTS = ("glyphs", "positions", "masked_latents")
_PREDICTIONS = ("x0_cond", "x0_uncond")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch(Tensors):
    """B records; c is the context's width, k the most chunks of any of them, R rollouts, S called states.

    Floating-point tensors are float16, as stored.
    """

    conditioning: ConditioningBatch
    """Of the B records; glyphs and positions are uint8."""
    rollout_latents: Tensor
    """(B, R, S + 1, C, h, w): states at which the network was called, then the solved x0."""
    rollout_timesteps: Tensor
    """(B, S) int64."""
    x0_cond: Tensor | None
    """(B, R, S, C, h, w), None unless predictions were read."""
    x0_uncond: Tensor | None
    """Likewise."""
    indices: Tensor
    """(B,) int64: each sample's index in the set. Draws derive from (seed, epoch, index)."""
    epochs: Tensor
    """(B,) int64: each sample's epoch; a batch may hold the end of one epoch and the start of the next."""

    def __len__(self) -> int:
        return int(self.indices.shape[0])


def collate(
    records: Sequence[Record], indices: Sequence[int] | None = None, epochs: Sequence[int] | None = None
) -> Batch:
    """Put records side by side; contexts of different length are padded and masked.

    Args:
        records: one or more of the same set.
        indices: of each record in the set; 0, 1, 2 ... if not given.
        epochs: of each record; 0 if not given.

    Raises:
        DataError: tensors of the records differ in shape, or only some have predictions.
    """
    names = ("image_context", *_STACKED, *_HINTS, *_PREDICTIONS)
    rows = []
    for record in records:
        values = {name: getattr(record, name) for name in names}
        rows.append({name: value.numpy() for name, value in values.items() if value is not None})
    return collate_arrays(rows, range(len(rows)) if indices is None else indices, epochs or [0] * len(rows))


def collate_arrays(rows: Sequence[Mapping[str, Array]], indices: Sequence[int], epochs: Sequence[int]) -> Batch:
    """Do what `collate` does from arrays by field name, as `ShardSet.arrays` reads them."""
    if not rows:
        raise ValueError("no records to collate")
    image_context, mask = _pad([row["image_context"] for row in rows], indices)
    stacked = {name: _stack(name, rows, indices) for name in (*_STACKED, *_HINTS)}
    predicted: dict[str, Any] = {
        name: _stack(name, rows, indices) if any(name in row for row in rows) else None for name in _PREDICTIONS
    }
    return Batch(
        conditioning=ConditioningBatch(
            image_context=image_context,
            context_mask=mask,
            text_context=stacked.pop("text_context"),
            hints=Hints(**{name: stacked.pop(name) for name in _HINTS}),
        ),
        **stacked,
        **predicted,
        indices=torch.tensor(list(indices), dtype=torch.int64),
        epochs=torch.tensor(list(epochs), dtype=torch.int64),
    )


def _pad(contexts: Sequence[Array], indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Do what `pad_contexts` does, straight from the arrays that were read."""
    width = contexts[0].shape[1]
    padded = torch.zeros(len(contexts), max(len(c) for c in contexts), width, dtype=torch.float16)
    mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
    view = padded.numpy()
    for row, (context, index) in enumerate(zip(contexts, indices, strict=True)):
        if context.shape[1] != width:
            raise DataError(
                f"sample {index}: image_context is {context.shape[1]} wide, "
                f"expected {width} as in sample {indices[0]}"
            )
        view[row, : len(context)] = context
        mask[row, : len(context)] = True
    return padded, None if bool(mask.all()) else mask


def _stack(name: str, rows: Sequence[Mapping[str, Array]], indices: Sequence[int]) -> Tensor:
    for row, index in zip(rows, indices, strict=True):
        received = row[name].shape if name in row else "missing"
        expected = rows[0][name].shape if name in rows[0] else "missing"
        if received != expected:
            raise DataError(
                f"sample {index}: {name} is {received}, expected {expected} as in sample {indices[0]}; "
                "were they recorded with other settings?"
            )
    return torch.from_numpy(np.stack([row[name] for row in rows]))
