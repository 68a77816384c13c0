"""The plan: which inputs go into which shard. Written before the first shard, extended later, never changed.

A segment file names, in order, the inputs that one extension added:

    {"schema":1,"first_shard":0,"first_index":0,"samples_per_shard":256,"count":1000,"sha256":"<of all that>"}
    <input id>
    <input id>
    ...

Inputs added later start a new segment with a new shard, so that committed shards stay as they are. With the
plan any task knows its shards, `status` knows how many there will be, and a deleted shard is missed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, overload

from common.errors import DataError
from common.faults import naming
from common.files import canonical_json, create_once
from shards.files.names import PLAN_DIR, SCHEMA

_RESTORE = "restore it from a copy"
_HEADER_BYTES = 4096
"""More than the first line of a segment has."""
_CHUNK_LINES = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedShard:
    """One shard that the set will have."""

    shard_index: int
    first_index: int
    """Sample index (key) of its first input; the others follow by one."""
    input_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The inputs that one extension added."""

    first_shard: int
    first_index: int
    samples_per_shard: int
    input_ids: Sequence[str]

    @property
    def num_shards(self) -> int:
        """Shards of this segment; the last may be short."""
        return -(-len(self.input_ids) // self.samples_per_shard)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """How much is planned, without the inputs' ids."""

    segments: tuple[tuple[int, int, int], ...]
    """Of each: first shard, samples per shard, inputs."""
    hashes: tuple[str, ...]
    """SHA-256 of each."""

    @property
    def num_shards(self) -> int:
        """Shards that the set will have."""
        return sum(-(-count // size) for _first, size, count in self.segments)

    @property
    def num_inputs(self) -> int:
        """Inputs that the set will have tried."""
        return sum(count for _first, _size, count in self.segments)

    def inputs_of(self, shard_index: int) -> int:
        """Return how many inputs a shard has; 0 if it is not planned."""
        for first, size, count in self.segments:
            if first <= shard_index < first - (-count // size):
                return min(size, count - (shard_index - first) * size)
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All segments of a set."""

    segments: tuple[Segment, ...]

    @property
    def num_shards(self) -> int:
        """Shards that the set will have."""
        return sum(segment.num_shards for segment in self.segments)

    @property
    def num_inputs(self) -> int:
        """Inputs that the set will have tried."""
        return sum(len(segment.input_ids) for segment in self.segments)

    def shards(self) -> Iterator[PlannedShard]:
        """Yield every shard, in order of index."""
        for index in range(self.num_shards):
            yield self.shard(index)

    def shard(self, shard_index: int) -> PlannedShard:
        """Return a shard; of a long plan only its part is read."""
        segment = next(s for s in reversed(self.segments) if s.first_shard <= shard_index)
        start = (shard_index - segment.first_shard) * segment.samples_per_shard
        return PlannedShard(
            shard_index=shard_index,
            first_index=segment.first_index + start,
            input_ids=tuple(segment.input_ids[start : start + segment.samples_per_shard]),
        )


class IdLines(Sequence[str]):
    """The ids of a segment, one a line: read from its file where they are asked for, if all have one length."""

    def __init__(
        self, path: Path, start: int, count: int, update: Callable[[bytes], object], file: IO[bytes]
    ) -> None:
        """Pass over the lines once.

        Args:
            path: the segment's.
            start: byte at which the lines begin.
            count: of lines, as the header says.
            update: takes all bytes, in order.
            file: open at the start.
        """
        self._path, self._start, self._count = path, start, count
        first = file.readline()
        self._width = len(first)
        update(first)
        chunk, seen, even = self._width * _CHUNK_LINES, len(first), first.endswith(b"\n")
        while chunk and (data := file.read(chunk)):
            update(data)
            seen += len(data)
            lines = data.count(b"\n")
            even = even and data[self._width - 1 :: self._width].count(b"\n") == lines == len(data) / self._width
        self._few: list[str] | None = None
        if not (even and seen == count * self._width):
            with path.open("rb") as again:
                again.seek(start)
                self._few = again.read().decode().splitlines()

    def __len__(self) -> int:
        return self._count if self._few is None else len(self._few)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if self._few is not None:
            return self._few[index]
        if isinstance(index, int):
            return self[index : index + 1][0] if index >= 0 else self[len(self) + index]
        begin, end, step = index.indices(len(self))
        with naming(self._path), self._path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), max(end - begin, 0) * self._width, self._start + begin * self._width)
        return data.decode().splitlines()[::step]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash((len(self), self[0] if len(self) else None))


def extend_plan(folder: Path, input_ids: Sequence[str], samples_per_shard: int) -> Plan:
    """Add the inputs that the set does not have yet, in the given order; repeated ids count once.

    Tasks may race, with the same inputs or with others: each ends with a plan that holds all of its own.

    Args:
        folder: the set's.
        input_ids: of all inputs of this run, old and new.
        samples_per_shard: of new shards.

    Raises:
        DataError: an id cannot be stored, or the plan is damaged.
    """
    for input_id in input_ids:
        if not input_id or any(c.isspace() for c in input_id):
            raise DataError(f"input id {input_id!r}: expected a hash without white space")
    (folder / PLAN_DIR).mkdir(exist_ok=True)
    while True:
        plan = read_plan(folder)
        known = {input_id for segment in plan.segments for input_id in segment.input_ids}
        new = tuple(dict.fromkeys(input_id for input_id in input_ids if input_id not in known))
        if not new:
            return plan
        segment = Segment(
            first_shard=plan.num_shards,
            first_index=plan.num_inputs,
            samples_per_shard=samples_per_shard,
            input_ids=new,
        )
        create_once(segment_path(folder, len(plan.segments)), _encode(segment))  # lost a race: read again


def read_plan(folder: Path) -> Plan:
    """Read a set's plan; a set without one has no segments.

    Raises:
        DataError: a segment is damaged or missing.
    """
    segments: list[Segment] = []
    for path in _segment_paths(folder):
        segment = _read_segment(path)
        expected = sum(s.num_shards for s in segments), sum(len(s.input_ids) for s in segments)
        if (segment.first_shard, segment.first_index) != expected:
            raise DataError(f"{path}: does not continue the segments before it; is it from another set?")
        segments.append(segment)
    return Plan(segments=tuple(segments))


def read_outline(folder: Path) -> Outline:
    """Read how much is planned, from the first line of each segment; `read_plan` checks all of it.

    Raises:
        DataError: a segment's first line is damaged, or a segment is missing.
    """
    segments, hashes = [], []
    for path in _segment_paths(folder):
        with naming(path), path.open("rb") as file:
            line = file.readline(_HEADER_BYTES)
        try:
            header = json.loads(line)
            segments.append((int(header["first_shard"]), int(header["samples_per_shard"]), int(header["count"])))
            hashes.append(str(header["sha256"]))
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: the plan is {'damaged' if line else 'empty'}; {_RESTORE}") from None
    return Outline(segments=tuple(segments), hashes=tuple(hashes))


def _segment_paths(folder: Path) -> list[Path]:
    present = {path.name for path in (folder / PLAN_DIR).glob("[0-9]*.txt")}
    paths = [segment_path(folder, number) for number in range(len(present))]
    for path in paths:
        if path.name not in present:
            raise DataError(f"{path} is missing, later segments are there; {_RESTORE}")
    return paths


def segment_path(folder: Path, number: int) -> Path:
    """Return where a segment lies."""
    return folder / PLAN_DIR / f"{number:06d}.txt"


def _encode(segment: Segment) -> bytes:
    lines = "".join(f"{input_id}\n" for input_id in segment.input_ids).encode()
    header = {
        "schema": SCHEMA,
        "first_shard": segment.first_shard,
        "first_index": segment.first_index,
        "samples_per_shard": segment.samples_per_shard,
        "count": len(segment.input_ids),
    }
    checked = canonical_json(header) + lines
    return canonical_json({**header, "sha256": hashlib.sha256(checked).hexdigest()}) + lines


def _read_segment(path: Path) -> Segment:
    """Read a segment's header and check all of it; its ids are read when they are asked for.

    Raises:
        DataError: it is damaged.
    """
    with naming(path), path.open("rb") as file:
        line = file.readline(_HEADER_BYTES)
        try:
            header = json.loads(line)
            digest = hashlib.sha256()
            sha256, count = header.pop("sha256"), int(header["count"])
            digest.update(canonical_json(header))
            ids = IdLines(path, len(line), count, digest.update, file)
            intact = digest.hexdigest() == sha256 and len(ids) == count and header["schema"] == SCHEMA
        except (ValueError, KeyError, TypeError, AttributeError):
            intact = False
    if not intact:
        raise DataError(f"{path}: the plan is {'damaged' if line else 'empty'}; {_RESTORE}")
    return Segment(
        first_shard=header["first_shard"],
        first_index=header["first_index"],
        samples_per_shard=header["samples_per_shard"],
        input_ids=ids,
    )
