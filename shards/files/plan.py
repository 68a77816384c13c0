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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from common.faults import naming
from common.files import canonical_json, create_once, read_bytes
from shards.files.names import PLAN_DIR, SCHEMA

_RESTORE = "restore it from a copy"
_HEADER_BYTES = 4096
"""More than the first line of a segment has."""


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
    input_ids: tuple[str, ...]

    @property
    def num_shards(self) -> int:
        """Shards of this segment; the last may be short."""
        return -(-len(self.input_ids) // self.samples_per_shard)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """How much is planned, without the inputs' ids."""

    segments: tuple[tuple[int, int, int], ...]
    """Of each: first shard, samples per shard, inputs."""

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
        for segment in self.segments:
            for number in range(segment.num_shards):
                start = number * segment.samples_per_shard
                yield PlannedShard(
                    shard_index=segment.first_shard + number,
                    first_index=segment.first_index + start,
                    input_ids=segment.input_ids[start : start + segment.samples_per_shard],
                )


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
        create_once(_segment_path(folder, len(plan.segments)), _encode(segment))  # lost a race: read again


def read_plan(folder: Path) -> Plan:
    """Read a set's plan; a set without one has no segments.

    Raises:
        DataError: a segment is damaged or missing.
    """
    segments: list[Segment] = []
    for path in _segment_paths(folder):
        segment = _decode(read_bytes(path), path)
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
    segments = []
    for path in _segment_paths(folder):
        with naming(path), path.open("rb") as file:
            line = file.readline(_HEADER_BYTES)
        try:
            header = json.loads(line)
            segments.append((int(header["first_shard"]), int(header["samples_per_shard"]), int(header["count"])))
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: the plan is {'damaged' if line else 'empty'}; {_RESTORE}") from None
    return Outline(segments=tuple(segments))


def _segment_paths(folder: Path) -> list[Path]:
    present = {path.name for path in (folder / PLAN_DIR).glob("[0-9]*.txt")}
    paths = [_segment_path(folder, number) for number in range(len(present))]
    for path in paths:
        if path.name not in present:
            raise DataError(f"{path} is missing, later segments are there; {_RESTORE}")
    return paths


def _segment_path(folder: Path, number: int) -> Path:
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


def _decode(data: bytes, path: Path) -> Segment:
    first, _newline, lines = data.partition(b"\n")
    try:
        header = json.loads(first)
        sha256 = header.pop("sha256")
        intact = hashlib.sha256(canonical_json(header) + lines).hexdigest() == sha256
        input_ids = tuple(lines.decode().splitlines())
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact or header.get("schema") != SCHEMA or header["count"] != len(input_ids):
        raise DataError(f"{path}: the plan is {'damaged' if data else 'empty'}; {_RESTORE}")
    return Segment(
        first_shard=header["first_shard"],
        first_index=header["first_index"],
        samples_per_shard=header["samples_per_shard"],
        input_ids=input_ids,
    )
