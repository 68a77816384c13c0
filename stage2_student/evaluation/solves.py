"""The teacher's own solves that an evaluation measures against, and the measuring of a sampled batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import google_crc32c
import torch
from torch import Tensor

from common.errors import DataError
from common.files import read_bytes, write_bytes_atomic
from common.pictures import Picture
from common.progress import Progress
from common.signals import StopFlag
from shards.records.tensor_file import Array, dump_tensors, load_metadata, load_tensors
from stage2_student.evaluation.endpoint import Distance, StateError, mean_squares, psnr, square_errors
from stage2_student.evaluation.runs import Job

SOLVES_FOLDER = "solve"
"""In an evaluation's folder: a file for each image's solve."""
MOST_PICTURE_BYTES = 1 << 28
"""Of decoded solves that are kept in memory; the others are decoded again for every run."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solve:
    """What the teacher's own solve made of one image's noise."""

    latents: Tensor
    """(C, h, w) float16, as stage one records x0."""
    cells: Tensor
    """(1, h, w) uint8: 1 in the latent cells that hold text; see `common.regions.text_cells`."""
    states: Mapping[int, Tensor] = field(default_factory=dict)
    """The teacher's states by timestep, (C, h, w) float16, under `common.ddim.CLEAN` the end; empty where only the
    end is known."""


class Solves(Protocol):
    """Gives the teacher's solves from the noise of an evaluation's images."""

    def of(self, jobs: Sequence[Job]) -> list[Solve]:
        """Return the solve of each image."""
        ...


class KeptSolves:
    """Solves that are made once, when they are first asked for, and kept in the evaluation's folder."""

    def __init__(
        self, folder: Path, solve: Callable[[Sequence[Job]], Tensor], cells: Callable[[Sequence[Job]], Tensor]
    ) -> None:
        """Open what is there.

        Args:
            folder: of the evaluation. Whoever opens it has checked that it was made with the same settings.
            solve: the teacher, from the noise of B images to their latents, (B, C, h, w).
            cells: where these hold text, (B, 1, h, w), 1 or 0.
        """
        self._folder, self._solve, self._cells = folder / SOLVES_FOLDER, solve, cells

    def of(self, jobs: Sequence[Job]) -> list[Solve]:
        """Return the solve of each image, those that are not there yet made in one batch.

        Raises:
            DataError: a file is damaged, or the teacher produced NaN or Inf.
        """
        missing = [job for job in jobs if not self._path(job).exists()]
        if missing:
            self.keep(missing, self._solve(missing))
        return [self._read(self._path(job)) for job in jobs]

    def keep(self, jobs: Sequence[Job], latents: Tensor) -> None:
        """Keep solves that were made for the table; what is there stays.

        Args:
            jobs: B images.
            latents: (B, C, h, w), float16 in value.
        """
        for job, solved, cells in zip(jobs, latents.half().cpu(), self._cells(jobs).byte().cpu(), strict=True):
            if not (path := self._path(job)).exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                arrays = {"latents": solved.numpy(), "cells": cells.numpy()}
                write_bytes_atomic(path, dump_tensors(arrays, {"crc32c": _checksum(arrays)}))

    def fill(self, jobs: Sequence[Job], batch_size: int, stop: StopFlag) -> None:
        """Make all that are missing, a batch at a time.

        Raises:
            Stopped: a signal came; what is made is kept.
        """
        left = [job for job in jobs if not self._path(job).exists()]
        if not left:
            return
        with Progress(len(jobs), "the teacher's own solve", "image", initial=len(jobs) - len(left)) as progress:
            for start in range(0, len(left), batch_size):
                done = len(jobs) - len(left) + start
                stop.raise_if_requested(f"{done} of {len(jobs)} solves to measure against are made")
                batch = left[start : start + batch_size]
                self.keep(batch, self._solve(batch))
                progress.update(len(batch))

    def _path(self, job: Job) -> Path:
        layout, sample = job
        return self._folder / f"{layout.layout_id}_{sample}.safetensors"

    def _read(self, path: Path) -> Solve:
        remedy = "remove the file, and evaluate again"
        data = read_bytes(path)
        try:
            arrays, metadata = load_tensors(data, str(path)), load_metadata(data, str(path))
        except DataError as error:
            raise DataError(f"{error}; {remedy}") from None
        if arrays.keys() != {"latents", "cells"} or metadata.get("crc32c") != _checksum(arrays):
            raise DataError(f"{path}: damaged, its checksum is another; {remedy}")
        latents, cells = (torch.from_numpy(arrays[name].copy()) for name in ("latents", "cells"))
        return Solve(latents=latents, cells=cells)


def _checksum(arrays: Mapping[str, Array]) -> str:
    return f"{google_crc32c.value(arrays['latents'].tobytes() + arrays['cells'].tobytes()):08x}"


class EndpointMeasure:
    """Measures sampled batches against the teacher's own solves of the same noise."""

    def __init__(
        self, solves: Solves, decode: Callable[[Tensor], Sequence[Picture]], *, along_the_way: bool = False
    ) -> None:
        """Measure.

        Args:
            solves: what is measured against.
            decode: latents (B, C, h, w) to pictures.
            along_the_way: whether the solves' states are known, so that those of samplers are wanted.
        """
        self._solves, self._decode, self.along_the_way = solves, decode, along_the_way
        self._pictures: dict[tuple[str, int], Picture] = {}
        self._bytes = 0

    def __call__(
        self,
        jobs: Sequence[Job],
        latents: Tensor,
        pictures: Sequence[Picture],
        states: Sequence[tuple[int, Tensor]] = (),
    ) -> list[Distance]:
        """Measure a batch.

        Args:
            jobs: its B images.
            latents: (B, C, h, w), as sampled.
            pictures: these decoded.
            states: the timestep at which a step ended, and the state there, (B, C, h, w).
        """
        solves = self._solves.of(jobs)
        solved = torch.stack([solve.latents for solve in solves])
        errors = square_errors(latents, solved, torch.stack([solve.cells for solve in solves]))
        ways = [_measure_way(solve, row, states) for row, solve in enumerate(solves)]
        decoded = self._decoded(jobs, solves)
        return [
            Distance(latents=error, psnr=psnr(picture, aim), way=way)
            for error, picture, aim, way in zip(errors, pictures, decoded, ways, strict=True)
        ]

    def _decoded(self, jobs: Sequence[Job], solves: Sequence[Solve]) -> list[Picture]:
        found = {}
        for (layout, sample), solve in zip(jobs, solves, strict=True):
            key = layout.layout_id, sample
            picture = self._pictures.get(key)
            if picture is None:
                (picture,) = self._decode(solve.latents[None].float())
                if self._bytes + picture.nbytes <= MOST_PICTURE_BYTES:
                    self._pictures[key] = picture
                    self._bytes += picture.nbytes
            found[key] = picture
        return [found[layout.layout_id, sample] for layout, sample in jobs]


def _measure_way(solve: Solve, row: int, states: Sequence[tuple[int, Tensor]]) -> tuple[StateError, ...]:
    """Compare the states of an image with the teacher's, at the timesteps at which both have one."""
    return tuple(
        StateError(
            timestep=timestep,
            square=float(mean_squares(state[row : row + 1], solve.states[timestep][None]).mean()),
        )
        for timestep, state in states
        if timestep in solve.states
    )
