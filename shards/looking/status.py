"""How far a running set is, from its folder alone: needs no torch and disturbs nobody."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from common.faults import naming
from shards.files.failures import count_by_reason, read_failures
from shards.files.locks import is_dead, temporaries
from shards.files.manifest import read_manifest
from shards.files.names import parse_sidecar_name
from shards.files.plan import read_plan
from shards.files.sidecar import HEADER_READ_BYTES, SidecarHeader, decode_header

_RECENT = 32
"""Shards, last committed, from which the rate is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Progress of a set."""

    shards_planned: int
    shards_done: int
    """Committed, by size; hashes are not checked."""
    shards_in_work: tuple[str, ...]
    """Names of shards that a living task is writing."""
    leftovers: int
    """Temporary files of dead tasks; the next run removes them."""
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

    @property
    def seconds_left(self) -> float | None:
        """Estimate at the recent rate; 0 if done, None if unknown."""
        left = self.inputs_planned - self.inputs_done
        if left <= 0:
            return 0.0
        return left / self.inputs_per_second if self.inputs_per_second else None


def read_status(folder: Path, now: float | None = None) -> Status:
    """Look at a set.

    Args:
        folder: the set's.
        now: the time to compare with, seconds since the epoch; the clock's if None.

    Raises:
        DataError: there is no set.
    """
    read_manifest(folder)
    plan = read_plan(folder)
    done, problems = _read_sidecars(folder)
    in_work, leftovers = [], 0
    for path in temporaries(folder):
        if is_dead(path):
            leftovers += 1
        elif ".tar." in path.name:
            in_work.append(path.name[1:].partition(".tar.")[0] + ".tar")
    inputs_done = sum(header.count + header.failed for header, _time in done)
    now = time.time() if now is None else now
    return Status(
        shards_planned=plan.num_shards or len(done),
        shards_done=len(done),
        shards_in_work=tuple(in_work),
        leftovers=leftovers,
        problems=tuple(problems),
        inputs_planned=plan.num_inputs or inputs_done,
        inputs_done=inputs_done,
        failures=count_by_reason(read_failures(folder)),
        inputs_per_second=_recent_rate(done),
        seconds_since_commit=now - max(committed for _header, committed in done) if done else None,
    )


def _read_sidecars(folder: Path) -> tuple[list[tuple[SidecarHeader, float]], list[str]]:
    """Return the header and commit time of every shard that counts as done, and why others do not."""
    done, problems = [], []
    for path in sorted(folder.glob("shard-*.json")):
        if parse_sidecar_name(path.name) is None:
            continue
        try:
            with naming(path), path.open("rb", buffering=0) as file:
                header = decode_header(file.read(HEADER_READ_BYTES) or b"", path.name)
            size = (folder / header.shard).stat().st_size
            if size != header.bytes:
                raise DataError(f"{header.shard}: {size} bytes, expected {header.bytes}")
            done.append((header, path.stat().st_mtime))
        except FileNotFoundError:
            problems.append(f"{path.name}: its shard is missing")
        except DataError as error:
            problems.append(str(error))
    return done, problems


def _recent_rate(done: Sequence[tuple[SidecarHeader, float]]) -> float | None:
    recent = sorted(done, key=lambda item: item[1])[-_RECENT:]
    if len(recent) < 2:
        return None
    seconds = recent[-1][1] - recent[0][1]
    inputs = sum(header.count + header.failed for header, _time in recent[1:])
    return inputs / seconds if seconds > 0 else None


def format_status(status: Status) -> list[str]:
    """Spell a status out, one fact a line."""
    share = status.inputs_done / max(status.inputs_planned, 1)
    lines = [
        f"shards   {status.shards_done} of {status.shards_planned} done, {len(status.shards_in_work)} in work",
        f"inputs   {status.inputs_done:,} of {status.inputs_planned:,} done ({share:.1%})",
    ]
    failed = sum(status.failures.values())
    reasons = "".join(f"; {number} {reason}" for reason, number in status.failures.items())
    lines.append(f"failed   {failed}{reasons}")
    if status.inputs_per_second:
        lines.append(f"rate     {status.inputs_per_second:.3g} inputs/s")
    if status.seconds_since_commit is not None:
        lines.append(f"last     committed {format_seconds(status.seconds_since_commit)} ago")
    if status.seconds_left:
        lines.append(f"left     {format_seconds(status.seconds_left)}")
    if status.leftovers:
        lines.append(f"dead     {status.leftovers} temporary files of dead tasks; the next run removes them")
    return lines + [f"problem  {problem}" for problem in status.problems]


def format_seconds(seconds: float) -> str:
    """Return e.g. "42 s", "3 min 5 s", "7 h 12 min", "3 d 4 h"."""
    whole = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small} {small_unit}"
    return f"{whole} s"
