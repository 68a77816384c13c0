"""Which shards of a set a task makes, in which order, and what has come of it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.files.failures import count_failures_of
from shards.files.names import shard_name
from shards.files.plan import Plan, PlannedShard
from shards.files.tasks import State, Task
from shards.looking.status import read_done
from shards.writing.writer import read_committed
from stage1_teacher.inputs.files import Inputs
from stage1_teacher.inputs.input import FontLacksCharacters

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 0.5
"""Between two looks at a task that may be dead."""


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
    """Committed by this run, of this task and of others, or made again for their trajectories."""
    shards_without_inputs: int
    """Missing, and not made because this run was not given their inputs."""
    records: int = 0
    """Written now."""
    failed: int
    """Inputs that failed, of this task's shards that were there and of those written now."""
    lacking: int = 0
    """Of those, the ones that no font can render."""
    uploaded: int = 0
    """Shards of this task uploaded now."""


class Share:
    """What a task works on: its own share of a set first, then whatever is missing of the others'.

    Shard j belongs to task j modulo the number of tasks, which decides only where a task starts: whoever has
    nothing of its own left takes what nobody makes.
    """

    def __init__(
        self,
        folder: Path,
        identity_sha256: str,
        plan: Plan,
        inputs: Inputs,
        task: Task,
        *,
        make_again: Callable[[int], bool] = lambda _shard_index: False,
    ) -> None:
        """Look at what is committed.

        Args:
            folder: the set's.
            identity_sha256: its manifest's.
            plan: all of its shards.
            inputs: of this run.
            task: that works; it claims each shard before it makes it.
            make_again: asked of a committed shard's index; true if it must be solved again all the same.
        """
        self._folder, self._identity, self._plan, self._inputs = folder, identity_sha256, plan, inputs
        self._task, self._make_again = task, make_again
        index, count = task.note.task_index, task.note.num_tasks
        self.own = range(index, plan.num_shards, count)
        headers = {
            shard: header
            for shard in self.own
            if (header := read_committed(folder, shard_name(shard), identity_sha256)) is not None
            and not make_again(shard)
        }
        self.found = tuple(header.shard for header in headers.values())
        there = {shard.shard_index for shard in read_done(folder)[0]} if count > 1 else set()
        own = [shard for shard in self.own if shard not in headers]
        others = [
            shard
            for shard in range(plan.num_shards)
            if shard not in self.own and (shard not in there or make_again(shard))
        ]
        begin = plan.num_shards * index // count  # tasks that help begin at different places
        self._pending = deque(own + sorted(others, key=lambda shard: (shard < begin, shard)))
        self._own_written = 0
        self.own_inputs = sum(len(plan.shard(shard).input_ids) for shard in own)
        self.done = Done(
            shards_planned=plan.num_shards,
            shards_found=len(headers),
            shards_without_inputs=0,
            failed=sum(header.failed for header in headers.values()),
            lacking=sum(
                count_failures_of(folder, header.shard, FontLacksCharacters.REASON)
                for header in headers.values()
                if header.failed
            ),
        )

    @property
    def committed_so_far(self) -> str:
        """What is safe, in words."""
        others = self.done.shards_written - self._own_written
        more = f", and {others} more shards" if others else ""
        return f"{len(self.found) + self._own_written} of this task's {len(self.own)} shards{more} are committed"

    def note_written(self, shard: PlannedShard, records: int) -> None:
        """Count a shard that this task committed."""
        self.done.records += records
        self.done.shards_written += 1
        self._own_written += shard.shard_index in self.own
        self._task.say(committed=self.done.shards_written)

    def take(self, check_stop: Callable[[], None] = lambda: None) -> Iterator[Todo]:
        """Yield shards to be made, one at a time, each claimed until the next one is asked for.

        Before each one is chosen the set is looked at again. What another task makes is left to it, unless that
        task is found dead; where that is not known yet, it is watched for as long as it takes.

        Args:
            check_stop: called while this waits; raises to end it.
        """
        while True:
            left, unsure = [], False
            while self._pending:
                shard = self._pending.popleft()
                found = self._try(shard)
                if isinstance(found, Todo):
                    try:
                        yield found
                    finally:
                        self._task.say(shard=None)
                        self._task.release(_claim_name(shard))
                elif found is not None:
                    left.append(shard)
                    unsure = unsure or found is State.UNSURE
            self._pending.extend(left)
            if not unsure:
                break
            check_stop()
            time.sleep(_WATCH_SECONDS)
        if self.done.shards_without_inputs:
            logger.warning(
                "%s: %d planned shards cannot be made: this run was not given all of their inputs; "
                "give the files of earlier runs too",
                self._folder,
                self.done.shards_without_inputs,
            )

    def _try(self, shard_index: int) -> Todo | State | None:
        """Claim a shard; None if there is nothing to make, else what is known of the task that has it."""
        if self._is_made(shard_index):
            return None
        shard = self._plan.shard(shard_index)
        indices = [self._inputs.find(input_id) for input_id in shard.input_ids]
        known = tuple(index for index in indices if index is not None)
        if len(known) < len(indices):
            self.done.shards_without_inputs += 1
            return None
        state = self._task.claim(_claim_name(shard_index))
        if state is not None:
            return state
        if self._is_made(shard_index):  # it was committed while it was being claimed
            self._task.release(_claim_name(shard_index))
            return None
        self._task.say(shard=shard_name(shard_index))
        return Todo(shard, known)

    def _is_made(self, shard_index: int) -> bool:
        name = shard_name(shard_index)
        return read_committed(self._folder, name, self._identity) is not None and not self._make_again(shard_index)


def _claim_name(shard_index: int) -> str:
    return shard_name(shard_index).removesuffix(".tar")
