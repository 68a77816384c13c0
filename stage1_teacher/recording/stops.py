"""Stops on a shard without a commit, counted from run to run: slices shorter than a shard would never end."""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import MachineError, Stopped
from common.files import canonical_json, read_bytes, write_bytes_atomic
from shards.files.names import STOPS_DIR

MOST_STOPS = 2
"""Runs of a task that may end on one shard, with nothing committed, before that is an error."""


class Stops:
    """The stops of one task."""

    def __init__(self, folder: Path, task_index: int) -> None:
        """Look where a set keeps them.

        Args:
            folder: the set's.
            task_index: of the task.
        """
        self._folder, self._task = folder / STOPS_DIR, str(task_index)

    def add(self, shard: str) -> int:
        """Count a stop on a shard; returns how many there were."""
        counts = self._read(shard)
        counts[self._task] = counts.get(self._task, 0) + 1
        self._folder.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(self._path(shard), canonical_json(counts))
        return counts[self._task]

    def clear(self, shard: str) -> None:
        """Forget the stops on a shard: it is committed."""
        self._path(shard).unlink(missing_ok=True)

    def _read(self, shard: str) -> dict[str, int]:
        try:
            counts = json.loads(read_bytes(self._path(shard)))
            return {str(task): int(count) for task, count in counts.items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return {}

    def _path(self, shard: str) -> Path:
        return self._folder / f"{shard}.json"


def refuse_endless_stops(error: Stopped, stops: Stops, shard: str, seconds: float, expected: float | None) -> None:
    """Count a stop; the second one of a task on a shard is an error that says what to change.

    Args:
        error: the stop.
        stops: of the task.
        shard: that was in work.
        seconds: since it was begun.
        expected: seconds that it takes; None if not one batch was finished.

    Raises:
        MachineError: it is the second stop.
    """
    count = stops.add(shard)
    if count < MOST_STOPS:
        return
    takes = "not even one batch was finished" if expected is None else f"it takes about {expected:.0f} s"
    raise MachineError(
        f"{shard}: stopped {count} times without a commit, this time after {seconds:.0f} s; {takes}: run again"
        " with a longer time limit, or an earlier begin of the work in it; for a new set lower"
        f" shards.samples_per_shard ({error})"
    ) from error
