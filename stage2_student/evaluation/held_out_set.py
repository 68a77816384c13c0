"""A recorded set as held-out data: its layouts, conditioning, noise, and the teacher's solves that start there.

Neither the teacher nor an encoder is needed for any of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from common.anytext2.conditioning import Conditioning, Uncond
from common.ddim import CLEAN
from common.differences import require_same
from common.errors import DataError, UsageError
from common.layouts import Layout, Line
from common.regions import text_cells
from shards.reading.reader import ShardSet
from shards.records.record import Record
from shards.trajectories import TrajectoryStore
from stage2_student.evaluation.runs import Job
from stage2_student.evaluation.samplers import draw_noise
from stage2_student.evaluation.solves import Solve
from stage2_student.student.shard_facts import ShardFacts, read_facts


class HeldOutSet:
    """The first records of a set, by their inputs' ids; of each image its noise and the solve from there."""

    def __init__(self, location: str, count: int, trajectories: Path | None = None) -> None:
        """Read what the records ask for.

        Args:
            location: the set's folder or URL.
            count: records wanted, the first ones; one of an input that came before is left out.
            trajectories: folder of the set's whole rollouts; None if only their ends are to be known.

        Raises:
            DataError: the set is incomplete or damaged, holds no solves, or the trajectories are another set's.
        """
        self._location = location
        self.shards = ShardSet.open(location)
        self.facts: ShardFacts = read_facts(self.shards)
        if self.facts.source != "rollout":
            raise DataError(
                f'{location}: holds records of source "{self.facts.source}", expected solves to measure against;'
                ' give a set recorded with precompute.source = "rollout"'
            )
        self._index_of: dict[str, int] = {}
        self.layouts: list[Layout] = []
        """What the records ask for, in order; no colours, which records do not hold."""
        suffix = self.shards.manifest.identity["config"].get("teacher", {}).get("prompt_suffix", "")
        for index in range(len(self.shards)):
            if len(self.layouts) == count:
                break
            record = self.shards[index]
            if self._index_of.setdefault(record.meta.input_id, index) == index:
                self.layouts.append(describe_record(record, suffix))
        self._store = None if trajectories is None else self._open_store(trajectories)

    @property
    def solver(self) -> dict[str, Any]:
        """How the solves were made, as the set's manifest has it under `config.precompute`."""
        return dict(self.shards.manifest.identity["config"]["precompute"])

    @property
    def has_states(self) -> bool:
        """Whether the states on the way are known."""
        return self._store is not None

    @cached_property
    def uncond(self) -> Uncond:
        """The unconditional contexts of all records."""
        return self.shards.uncond

    def require_samples(self, count: int) -> None:
        """Refuse more images of a layout than there are solves of it.

        Raises:
            UsageError: there are fewer.
        """
        if count > self.facts.num_rollouts:
            raise UsageError(
                f"evaluate.samples_per_layout: received {count}, expected at most {self.facts.num_rollouts}, the"
                f" solves of each record of {self._location}; record a set with more precompute.num_rollouts"
            )

    def conditioning(self, input_ids: Sequence[str]) -> list[Conditioning]:
        """Return what the teacher was given of inputs, float16 on the CPU."""
        return [self._read(name).conditioning for name in input_ids]

    def noise(self, jobs: Sequence[Job]) -> Tensor:
        """Return the recorded noise of B images, (B, C, h, w) float32 on the CPU."""
        return torch.stack(
            [self._read(layout.layout_id).rollout_latents[number, 0] for layout, number in jobs]
        ).float()

    def noises(self, jobs: Sequence[Job], count: int, seed: int) -> Tensor:
        """Return the noises of B images, (B, count, C, h, w) float32 on the CPU.

        Args:
            jobs: B of them.
            count: noises per image. The first is the recorded one; later ones, which a student of sampler "lcm"
                adds on the way, are not recorded, and drawn.
            seed: evaluate.seed, which keys those.
        """
        recorded = self.noise(jobs)[:, None]
        if count == 1:
            return recorded
        later = draw_noise(seed, jobs, tuple(recorded.shape[2:]), count)[:, 1:]
        return torch.cat([recorded, later], dim=1)

    def of(self, jobs: Sequence[Job]) -> list[Solve]:
        """Return the solve of each image.

        Raises:
            DataError: a record, or a state on the way, is damaged or missing.
        """
        return [self._solve(layout.layout_id, number) for layout, number in jobs]

    def _solve(self, input_id: str, number: int) -> Solve:
        record = self._read(input_id)
        latents = record.rollout_latents[number, -1]
        cells = text_cells(record.positions[None], (latents.shape[-2], latents.shape[-1]))[0].byte()
        return Solve(latents=latents, cells=cells, states=self._states(input_id, number))

    def _states(self, input_id: str, number: int) -> dict[int, Tensor]:
        if self._store is None:
            return {}
        rollout = self._store.read_rollout(self._samples[input_id] + number)  # (N + 1, C, h, w)
        return dict(zip([*self._store.timesteps, CLEAN], rollout, strict=True))

    def _read(self, input_id: str) -> Record:
        return self.shards[self._index_of[input_id]]

    def _open_store(self, folder: Path) -> TrajectoryStore:
        store = TrajectoryStore(folder)
        remedy = f"give the folder that precompute --trajectories wrote beside {self._location}"
        what = f"{folder}: the trajectories are not of this set"
        require_same(store.identity, self.shards.manifest.identity, what, remedy)
        self._samples: dict[str, int] = {}  # the place of an input's first solve
        for place, name in enumerate(store.input_ids):
            self._samples.setdefault(name, place)
        if lacking := [layout.layout_id for layout in self.layouts if layout.layout_id not in self._samples]:
            raise DataError(
                f"{folder}: no trajectory of input {lacking[0]}, which {self._location} holds; {remedy}"
            )
        return store


def describe_record(record: Record, prompt_suffix: str = "") -> Layout:
    """Say what a record's image is to show; whether the glyph map shows a line is seen from its ink.

    Args:
        record: of an input.
        prompt_suffix: what stage one put behind the caption.
    """
    meta = record.meta
    return Layout(
        layout_id=meta.input_id,
        size=meta.size,
        lines=tuple(
            Line(text=text.strip(), polygon=polygon, in_glyph_map=_has_ink(record, polygon))
            for text, polygon in zip(meta.texts, meta.polygons, strict=True)
            if text.strip()
        ),
        caption=meta.caption.removesuffix(f", {prompt_suffix}") if prompt_suffix else meta.caption,
    )


def _has_ink(record: Record, polygon: Sequence[tuple[float, float]]) -> bool:
    height, width = record.meta.size
    mask = Image.new("1", (width, height))
    ImageDraw.Draw(mask).polygon(list(polygon), fill=1)
    return bool((record.glyphs[0].numpy() > 0)[np.asarray(mask)].any())
