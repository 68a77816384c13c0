"""Which shards of a set a task makes, and how many of them it has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.files.failures import read_failures_of
from shards.files.names import shard_name
from shards.files.plan import Plan, PlannedShard
from shards.writing.writer import read_committed
from stage1_teacher.inputs.input import FontLacksCharacters

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Todo:
    """A shard to be made."""

    shard: PlannedShard
    indices: tuple[int, ...]
    """Its inputs' places among the inputs of this run."""


@dataclass(slots=True, kw_only=True)
class Done:
    """What a run of a task comes to; grows while it works."""

    shards_planned: int
    """Of the whole set."""
    shards_found: int
    """Of this task, committed before."""
    shards_written: int = 0
    """Of this task, committed now, or made again for their trajectories."""
    shards_without_inputs: int
    """Of this task, not made because this run was not given their inputs."""
    records: int = 0
    """Written now."""
    failed: int
    """Inputs of this task's committed shards that failed, earlier runs included."""
    lacking: int = 0
    """Of those, the ones that no font can render."""
    uploaded: int = 0
    """Shards of this task uploaded now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One task's part of a set."""

    todo: tuple[Todo, ...]
    """Shards to be made now, in order."""
    shards: int
    """Shards of this task in all."""
    found: tuple[str, ...]
    """Names of those that were committed before this run, and are not made again."""
    done: Done
    """What has come of it."""

    @property
    def committed_so_far(self) -> str:
        """What is safe, in words."""
        return f"{len(self.found) + self.done.shards_written} of this task's {self.shards} shards are committed"


def choose_share(
    folder: Path,
    identity_sha256: str,
    plan: Plan,
    ids: Sequence[str],
    *,
    task_index: int,
    num_tasks: int,
    make_again: Callable[[int], bool] = lambda _shard_index: False,
) -> Share:
    """Look at what is committed and choose what is left: shard j belongs to task j modulo num_tasks.

    Args:
        folder: the set's.
        identity_sha256: its manifest's.
        plan: all of its shards.
        ids: of the inputs of this run, in order.
        task_index: 0 to num_tasks - 1.
        num_tasks: tasks that share the work.
        make_again: asked of a committed shard's index; true if it must be solved again all the same.
    """
    mine = [shard for shard in plan.shards() if shard.shard_index % num_tasks == task_index]
    headers = {
        shard.shard_index: header
        for shard in mine
        if (header := read_committed(folder, shard_name(shard.shard_index), identity_sha256)) is not None
        and not make_again(shard.shard_index)
    }
    pending = [shard for shard in mine if shard.shard_index not in headers]
    wanted = {input_id for shard in pending for input_id in shard.input_ids}
    backwards = range(len(ids) - 1, -1, -1)  # so that the first of equal inputs counts
    index_of = {ids[index]: index for index in backwards if ids[index] in wanted}
    todo = tuple(
        Todo(shard, tuple(index_of[input_id] for input_id in shard.input_ids))
        for shard in pending
        if all(input_id in index_of for input_id in shard.input_ids)
    )
    if len(todo) < len(pending):
        logger.warning(
            "%s: %d planned shards of this task cannot be made: this run was not given all of their inputs; "
            "give the files of earlier runs too",
            folder,
            len(pending) - len(todo),
        )
    return Share(
        todo=todo,
        shards=len(mine),
        found=tuple(header.shard for header in headers.values()),
        done=Done(
            shards_planned=plan.num_shards,
            shards_found=len(headers),
            shards_without_inputs=len(pending) - len(todo),
            failed=sum(header.failed for header in headers.values()),
            lacking=sum(
                failure.reason == FontLacksCharacters.REASON
                for header in headers.values()
                if header.failed
                for failure in read_failures_of(folder, header.shard)
            ),
        ),
    )
