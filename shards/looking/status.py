"""How far a running set is, from its folder alone: needs no torch and disturbs nobody."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError
from common.faults import naming
from common.files import is_locked, machine_name
from shards.files.failures import count_by_reason, read_failures
from shards.files.how_made import HowMade, read_how_made
from shards.files.locks import is_dead, temporaries
from shards.files.manifest import read_manifest
from shards.files.names import parse_shard_name, parse_sidecar_name, shard_name
from shards.files.plan import read_outline
from shards.files.sidecar import HEADER_READ_BYTES, decode_header
from shards.files.tasks import DEAD_SECONDS, Note, note_path, read_notes

_RECENT = 32
"""Shards, last committed, from which the rate is taken."""


class DoneShard(NamedTuple):
    """A shard that counts as done."""

    shard_index: int
    inputs: int
    """Recorded or failed."""
    committed: float
    """When, seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenTask:
    """A task that left a note."""

    note: Note
    alive: bool
    """As far as one look tells: of this machine for certain, of others by when the note was last written."""
    seconds_since_seen: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Progress of a set."""

    shards_planned: int
    shards_done: int
    """Committed, by size; hashes are not checked."""
    shards_in_work: tuple[str, ...]
    """Names of shards that a living task is making; none of them is done."""
    missing: tuple[int, ...]
    """Indices of shards that are planned, not done and in no living task's work."""
    tasks: tuple[SeenTask, ...]
    """That run, or died."""
    leftovers: int
    """Temporary files of dead tasks; the next run removes them, and so does `clean`."""
    problems: tuple[str, ...]
    """One line for each sidecar or shard that does not count as done though it is there."""
    inputs_planned: int
    inputs_done: int
    """Recorded or failed."""
    failures: dict[str, int]
    """Failed inputs by reason."""
    inputs_per_second: float | None
    """Of all tasks together, lately; None before a second commit."""
    seconds_since_commit: float | None
    """None before the first commit."""
    how_made: HowMade | None
    """How the set's tasks were started last; None if that is not known."""

    @property
    def seconds_left(self) -> float | None:
        """Estimate at the recent rate; 0 if done, None if unknown."""
        left = self.inputs_planned - self.inputs_done
        if left <= 0:
            return 0.0
        return left / self.inputs_per_second if self.inputs_per_second else None

    @property
    def is_complete(self) -> bool:
        """Whether all that is planned is done."""
        return self.shards_done == self.shards_planned


def read_status(folder: Path, now: float | None = None) -> Status:
    """Look at a set.

    Args:
        folder: the set's.
        now: the time to compare with, seconds since the epoch; the clock's if None.

    Raises:
        DataError: there is no set.
    """
    read_manifest(folder)
    now = time.time() if now is None else now
    plan = read_outline(folder)
    done, problems = read_done(folder)
    finished = {shard.shard_index for shard in done}
    tasks = tuple(_see_tasks(folder, now))
    leftovers, in_work = 0, {task.note.shard for task in tasks if task.alive and task.note.shard is not None}
    for path in temporaries(folder):
        if is_dead(path) or _is_of_the_dead(path, tasks):
            leftovers += 1
        elif ".tar." in path.name:
            in_work.add(path.name[1:].partition(".tar.")[0] + ".tar")
    in_work = {name for name in in_work if parse_shard_name(name) not in finished}
    inputs_done = sum(shard.inputs for shard in done)
    busy = finished | {parse_shard_name(name) for name in in_work}
    return Status(
        shards_planned=plan.num_shards or len(done),
        shards_done=len(done),
        shards_in_work=tuple(sorted(in_work)),
        missing=tuple(index for index in range(plan.num_shards) if index not in busy),
        tasks=tasks,
        leftovers=leftovers,
        problems=tuple(problems),
        inputs_planned=plan.num_inputs or inputs_done,
        inputs_done=inputs_done,
        failures=count_by_reason(read_failures(folder)),
        inputs_per_second=_recent_rate(done),
        seconds_since_commit=now - max(shard.committed for shard in done) if done else None,
        how_made=read_how_made(folder),
    )


def read_done(folder: Path) -> tuple[list[DoneShard], list[str]]:
    """Return every shard that counts as done, in order, and why others do not though something is there."""
    sizes, sidecars = {}, {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if parse_shard_name(entry.name) is not None:
                sizes[entry.name] = entry.stat().st_size
            elif (index := parse_sidecar_name(entry.name)) is not None:
                sidecars[entry.name] = index
    done, problems = [], []
    for name in sorted(sidecars):
        try:
            done.append(_read_done(folder / name, sidecars[name], sizes))
        except FileNotFoundError:
            continue  # a task makes it anew
        except DataError as error:
            problems.append(str(error))
    return done, problems


def _read_done(path: Path, shard_index: int, sizes: dict[str, int]) -> DoneShard:
    with naming(path), path.open("rb", buffering=0) as file:
        header = decode_header(file.read(HEADER_READ_BYTES) or b"", path.name)
        committed = os.fstat(file.fileno()).st_mtime
    shard = shard_name(shard_index)
    if header.shard != shard:
        raise DataError(f"{path.name}: it belongs to {header.shard}")
    if shard not in sizes and not (path.parent / shard).exists():
        raise DataError(f"{path.name}: its shard is missing")
    size = sizes[shard] if shard in sizes else (path.parent / shard).stat().st_size  # came since the listing
    if size != header.bytes:
        raise DataError(f"{shard}: {size} bytes, expected {header.bytes}")
    return DoneShard(shard_index, header.count + header.failed, committed)


def _see_tasks(folder: Path, now: float) -> Iterator[SeenTask]:
    for note in read_notes(folder):
        path = note_path(folder, note.token)
        try:
            since = max(now - path.stat().st_mtime, 0.0)
            held = is_locked(path) if note.machine == machine_name() else None
        except FileNotFoundError:
            continue  # it ended
        # One look sees no counter move: the time of the file has to do, which is only shown and removes nothing.
        yield SeenTask(note=note, alive=since < DEAD_SECONDS if held is None else held, seconds_since_seen=since)


def _is_of_the_dead(path: Path, tasks: Sequence[SeenTask]) -> bool:
    """Tell whether a temporary file was of a task that looks dead, or of another machine and of no task's."""
    makers = [task for task in tasks if f".{task.note.machine}.{task.note.token.partition('-')[0]}-" in path.name]
    if makers:
        return not any(task.alive for task in makers)
    return f".{machine_name()}." not in path.name


def _recent_rate(done: Sequence[DoneShard]) -> float | None:
    recent = sorted(done, key=lambda shard: shard.committed)[-_RECENT:]
    if len(recent) < 2:
        return None
    seconds = recent[-1].committed - recent[0].committed
    inputs = sum(shard.inputs for shard in recent[1:])
    return inputs / seconds if seconds > 0 else None
