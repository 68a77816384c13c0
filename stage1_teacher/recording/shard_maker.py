"""Making a task's shards, one after the other.

A shard is made from its own inputs alone and batches never cross its border: it holds the same bytes whoever makes
it, and however often that was interrupted.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import DataError, Stopped
from common.progress import Progress
from common.sections import PrecomputeConfig
from common.signals import StopFlag
from shards.files.failures import Failure
from shards.files.names import shard_name
from shards.files.plan import PlannedShard
from shards.records.record import Record
from shards.remote.upload import Uploader
from shards.writing.writer import ShardWriter
from stage1_teacher.inputs.files import Inputs
from stage1_teacher.inputs.input import FontLacksCharacters, InputFailure
from stage1_teacher.recording.recorder import Recorder
from stage1_teacher.recording.sending import send
from stage1_teacher.recording.share import Share, Todo
from stage1_teacher.recording.stops import Stops, refuse_endless_stops
from stage1_teacher.recording.trajectories import RolloutKeeper
from stage1_teacher.rendering.ahead import Outcome, render_ahead
from stage1_teacher.rendering.rendered_input import RenderedInput
from stage1_teacher.rendering.settings import RenderSettings

logger = logging.getLogger(__name__)


class ShardMaker:
    """Draws, records and commits."""

    def __init__(
        self,
        folder: Path,
        identity_sha256: str,
        share: Share,
        settings: PrecomputeConfig,
        stop: StopFlag,
        machine: Mapping[str, Any],
        stops: Stops,
        *,
        rollouts: RolloutKeeper | None = None,
        uploader: Uploader | None = None,
    ) -> None:
        """Take on a share; nothing is made before `make_all`.

        Args:
            folder: the set's.
            identity_sha256: its manifest's.
            share: what this task makes; its counts are kept up to date.
            settings: batch size, threads and the budget of failures.
            stop: asked between shards and batches.
            machine: device and library versions, stored in every sidecar.
            stops: of this task, from run to run.
            rollouts: keeps whole rollouts, which the recorder must give.
            uploader: sends every shard away after it was committed.
        """
        self._folder, self._identity_sha256 = folder, identity_sha256
        self._share, self._settings, self._stop, self._machine = share, settings, stop, machine
        self._rollouts, self._uploader = rollouts, uploader
        self._reasons: Counter[str] = Counter()
        self._stops = stops
        self._begun = 0.0  # of the shard in work, seconds
        self._expected: float | None = None

    def make_all(
        self, todo: Iterable[Todo], inputs: Inputs, render_settings: RenderSettings, recorder: Recorder
    ) -> None:
        """Make shards, one after the other.

        Args:
            todo: which; each is asked for when the one before is committed.
            inputs: of this run.
            render_settings: how they are rendered.
            recorder: records them.

        Raises:
            DataError: too many inputs failed, or the teacher did.
            MachineError: the disk or the upload failed, or this task was stopped on the same shard before.
            Stopped: a signal came; the shard in work is dropped.
        """
        workers = self._settings.render_workers
        ahead = 2 * self._settings.batch_size + workers
        with Progress(self._share.own_inputs, "precompute", "input") as progress:
            for item in todo:
                self.check_stop()
                with render_ahead(inputs, item.indices, render_settings, workers=workers, ahead=ahead) as rendered:
                    self._make_or_count_stop(item.shard, rendered, recorder, progress)

    def _make_or_count_stop(
        self, shard: PlannedShard, rendered: Iterator[Outcome], recorder: Recorder, progress: Progress
    ) -> None:
        name, self._begun, self._expected = shard_name(shard.shard_index), time.monotonic(), None
        try:
            self._make(shard, rendered, recorder, progress)
        except Stopped as error:
            if not self._share.done.shards_written:
                seconds = time.monotonic() - self._begun
                refuse_endless_stops(error, self._stops, name, seconds, self._expected)
            raise
        self._stops.clear(name)

    def _expect(self, shard: PlannedShard, inputs: int) -> None:
        """Say after the first batch how long a shard takes."""
        seconds = time.monotonic() - self._begun
        self._expected = seconds * len(shard.input_ids) / inputs
        logger.info(
            "%s: %d of %d inputs in %.1f s; the shard takes about %.0f s",
            shard_name(shard.shard_index),
            inputs,
            len(shard.input_ids),
            seconds,
            self._expected,
        )

    def check_stop(self) -> None:
        """Ask whether to go on; done between shards and between batches.

        Raises:
            Stopped: a signal came.
        """
        self._stop.raise_if_requested(self._share.committed_so_far)

    def _make(
        self, shard: PlannedShard, rendered: Iterator[Outcome], recorder: Recorder, progress: Progress
    ) -> None:
        writer = ShardWriter(
            self._folder, shard.shard_index, identity_sha256=self._identity_sha256, provenance=self._machine
        )
        rollouts: list[Tensor] = []
        failed: list[int] = []
        first = 0  # place within the shard
        with writer:
            for group in group_by_rendered(rendered, len(shard.input_ids), self._settings.batch_size):
                records, states = self._record_group(shard, first, group, recorder)
                rollouts += states
                for place, outcome in enumerate(group, start=first):
                    if isinstance(outcome, RenderedInput):
                        writer.add(shard.first_index + place, records.popleft())
                    else:
                        writer.fail(self._note(shard, place, outcome))
                        failed.append(place)
                if not first:
                    self._expect(shard, len(group))
                first += len(group)
                progress.update(len(group), failed=self._share.done.failed)
            header = writer.commit()
        if self._rollouts is not None:
            if header.sha256 != writer.sha256:
                logger.warning(
                    "%s was committed with other values than it has now (another device or version?): its "
                    "trajectories are not those of its records to the last bit",
                    header.shard,
                )
            self._rollouts.write(shard, rollouts, failed)
        if writer.has_won or self._rollouts is not None:
            self._share.note_written(shard, writer.count)
            self._send([header.shard])

    def _send(self, shards: Sequence[str]) -> None:
        if self._uploader is not None:
            send(self._uploader, shards, self._share, self._folder, self.check_stop)

    def _record_group(
        self, shard: PlannedShard, first: int, group: list[Outcome], recorder: Recorder
    ) -> tuple[deque[Record], list[Tensor]]:
        """Return the records of a group that starts at a place of its shard, and what whole rollouts there are."""
        records: deque[Record] = deque()
        rollouts: list[Tensor] = []
        try:
            for recorded in recorder.record([item for item in group if isinstance(item, RenderedInput)]):
                self.check_stop()
                records += recorded.records
                rollouts += [] if recorded.rollouts is None else [recorded.rollouts]
        except DataError as error:
            begin, end = shard.first_index + first, shard.first_index + first + len(group) - 1
            raise type(error)(f"{shard_name(shard.shard_index)}, inputs {begin} to {end}: {error}") from None
        return records, rollouts

    def _note(self, shard: PlannedShard, place: int, failure: InputFailure) -> Failure:
        """Count a failed input.

        Raises:
            DataError: it is one too many.
        """
        index = shard.first_index + place
        logger.warning("input %d failed: %s", index, failure)
        done = self._share.done
        done.failed += 1
        if isinstance(failure, FontLacksCharacters):  # a font's fault, not the inputs': no sign of bad data
            done.lacking += 1
        else:
            self._reasons[failure.reason] += 1
        allowed, bad = self._settings.max_failures, done.failed - done.lacking
        if bad > allowed:
            reason, count = self._reasons.most_common(1)[0]
            raise DataError(
                f"{bad} inputs of this task failed, precompute.max_failures is {allowed}; "
                f'{count} of them now with "{reason}"; the last one: {failure}; mend the inputs or raise the limit'
            )
        return Failure(
            input_id=shard.input_ids[place],
            sample_index=index,
            reason=failure.reason,
            message=str(failure),
        )


def group_by_rendered(rendered: Iterator[Outcome], count: int, batch_size: int) -> Iterator[list[Outcome]]:
    """Cut the next `count` outcomes into groups with `batch_size` rendered inputs, failures where they fall."""
    group: list[Outcome] = []
    for _ in range(count):
        group.append(next(rendered))
        if sum(isinstance(item, RenderedInput) for item in group) == batch_size:
            yield group
            group = []
    if group:
        yield group
