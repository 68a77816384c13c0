"""Encoded inputs, what their solves gave, and the records that these are joined to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.anytext2.conditioning import Conditioning
from common.errors import DataError
from common.on_device import OnItsWay
from common.sections import PrecomputeConfig
from common.seeding import derive_seed
from common.tensors import Tensors
from shards.records.meta import SampleMeta
from shards.records.record import Record
from stage1_teacher.rendering.rendered_input import RenderedInput


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored(Tensors):
    """What a record stores of a conditioning, float16; see `Conditioning`."""

    image_context: Tensor
    text_context: Tensor
    masked_latents: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """An input with what the teacher's encoders made of it."""

    index: int
    """In the plan."""
    rendered: RenderedInput
    conditioning: Conditioning
    """Where the teacher is, float32, rounded to what is stored."""
    stored: OnItsWay[Stored]
    """What the record keeps of it."""


@dataclass(frozen=True, slots=True)
class Item:
    """One solve."""

    encoded: Encoded
    rollout: int
    """Which one of the input's."""

    @property
    def conditioning(self) -> Conditioning:
        """Of the input; the same object for all of its rollouts."""
        return self.encoded.conditioning

    @property
    def seed(self) -> int:
        """Of the rollout's noise."""
        rendered = self.encoded.rendered
        return derive_seed(rendered.seed, rendered.input_id, "noise", self.rollout)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solved(Tensors):
    """What came of a batch of items, in their order: S called states and the end of each, on one device."""

    states: Tensor
    """(B, S + 1, C, h, w) float16."""
    timesteps: Tensor
    """(B, S) int64."""
    x0_cond: Tensor | None
    """(B, S, C, h, w) float16."""
    x0_uncond: Tensor | None
    """Likewise."""
    rollouts: Tensor | None = None
    """Every state of the solves, if they are wanted, (B, N + 1, C, h, w) float16."""

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice) -> Solved:
        return self.map(lambda values: values[rows])

    def then(self, later: Solved) -> Solved:
        """Put a later batch's items behind these."""
        return self.map(lambda *values: torch.cat(values), later)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """What a batch of solves gave."""

    records: list[tuple[int, Record]]
    """Of the inputs whose last rollout was in the batch, in order, each with its index in the plan."""
    rollouts: Tensor | None
    """Every state of the batch's solves, (B, N + 1, C, h, w) float16 on the CPU, if they are wanted: inputs in
    order, of each its rollouts in order."""


class Assembly:
    """Joins the rollouts of inputs, some of which two batches hold, to records."""

    def __init__(self, settings: PrecomputeConfig, where: str) -> None:
        """Begin with nothing; `where` names the inputs' shard in errors."""
        self._settings, self.where = settings, where
        self._items: list[Item] = []
        self._waiting: Solved | None = None  # of those, while an input is not whole yet

    def add(self, batch: Sequence[Item], arriving: OnItsWay[Solved]) -> Recorded:
        """Take the next batch; returns the records that are whole now."""
        solved, count = arriving.get(), self._settings.num_rollouts
        rollouts, solved = solved.rollouts, replace(solved, rollouts=None)
        self._items += batch
        waiting = solved if self._waiting is None else self._waiting.then(solved)
        records = []
        while len(waiting) >= count:
            items, self._items = self._items[:count], self._items[count:]
            with naming(self.where, items[0].encoded.index):
                records.append((items[0].encoded.index, self._assemble(items, waiting[:count])))
            waiting = waiting[count:]
        self._waiting = waiting
        return Recorded(records=records, rollouts=rollouts)

    def _assemble(self, items: Sequence[Item], solved: Solved) -> Record:
        """Join an input and its R rollouts to its record."""
        rendered, stored = items[0].encoded.rendered, items[0].encoded.stored.get()
        return Record(
            meta=SampleMeta(
                input_id=rendered.input_id,
                caption=rendered.caption,
                text_caption=rendered.text_caption,
                texts=rendered.texts,
                languages=rendered.languages,
                polygons=rendered.polygons,
                mode=rendered.mode,
                source=self._settings.source,
                seeds=tuple(item.seed for item in items),
                size=rendered.size,
                guidance_scale=self._settings.guidance_scale,
            ),
            image_context=stored.image_context,
            text_context=stored.text_context,
            masked_latents=stored.masked_latents,
            rollout_latents=solved.states,
            rollout_timesteps=solved.timesteps[0],
            x0_cond=solved.x0_cond,
            x0_uncond=solved.x0_uncond,
            glyphs=rendered.glyphs,
            positions=rendered.positions.sum(0, keepdim=True, dtype=torch.uint8),
        )


@contextmanager
def naming(where: str, *indices: int) -> Iterator[None]:
    """Say of which inputs an error is, and where they belong."""
    try:
        yield
    except DataError as error:
        first, last = min(indices), max(indices)
        which = f"input {first}" if first == last else f"inputs {first} to {last}"
        raise type(error)(f"{where}, {which}: {error}") from None
