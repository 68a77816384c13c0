"""Making a task's shards, one after the other.

A shard is made from its own inputs alone and batches never cross its border: it holds the same bytes whoever makes
it, and however often that was interrupted.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import DataError, Stopped
from common.overlap import Behind
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
from stage1_teacher.recording.assembly import Recorded
from stage1_teacher.recording.recorder import Numbered, Recorder
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
        ahead = 2 * max(self._settings.batch_size, self._settings.inputs_a_solve) + workers
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

    def expect(self, shard: PlannedShard, inputs: int) -> None:
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
        sheet = _Sheet(self, shard, writer, progress)
        groups = group_by_rendered(rendered, len(shard.input_ids), self._settings.batch_size)
        with writer:
            with Behind("write", threaded=recorder.overlaps) as writing:
                with closing(recorder.record(sheet.lay_out(groups), writer.name)) as batches:
                    for batch in batches:
                        self.check_stop()
                        writing.do(partial(sheet.write, batch))
                writing.do(sheet.write_rest)
            header = writer.commit()
        if self._rollouts is not None:
            if header.sha256 != writer.sha256:
                logger.warning(
                    "%s was committed with other values than it has now (another device or version?): its "
                    "trajectories are not those of its records to the last bit",
                    header.shard,
                )
            self._rollouts.write(shard, sheet.rollouts, sheet.failed)
        if writer.has_won or self._rollouts is not None:
            self._share.note_written(shard, writer.count)
            self._send([header.shard])

    def _send(self, shards: Sequence[str]) -> None:
        if self._uploader is not None:
            send(self._uploader, shards, self._share, self._folder, self.check_stop)

    @property
    def failed(self) -> int:
        """Inputs of this task that failed so far."""
        return self._share.done.failed

    def note(self, input_id: str, index: int, failure: InputFailure) -> Failure:
        """Count a failed input.

        Raises:
            DataError: it is one too many.
        """
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
            input_id=input_id,
            sample_index=index,
            reason=failure.reason,
            message=str(failure),
        )


class _Sheet:
    """A shard's inputs in their order, and what has been written of them.

    Laid out by the maker, written perhaps by another thread: records in the order of inputs, failures among them.
    """

    def __init__(self, maker: ShardMaker, shard: PlannedShard, writer: ShardWriter, progress: Progress) -> None:
        self._maker, self._shard, self._writer, self._progress = maker, shard, writer, progress
        self._laid_out = self._written = 0
        self._waiting: deque[tuple[int, Outcome]] = deque()  # by index in the plan
        self._records: deque[tuple[int, Record]] = deque()
        self.rollouts: list[Tensor] = []
        """What whole rollouts there are."""
        self.failed: list[int] = []
        """Places within the shard of inputs that failed."""

    def lay_out(self, groups: Iterable[Sequence[Outcome]]) -> Iterator[list[Numbered]]:
        """Pass groups on without their failures, for the recorder."""
        for group in groups:
            numbered = list(enumerate(group, start=self._shard.first_index + self._laid_out))
            self._laid_out += len(group)
            self._waiting.extend(numbered)
            yield [(index, item) for index, item in numbered if isinstance(item, RenderedInput)]

    def write(self, batch: Callable[[], Recorded]) -> None:
        """Write the records of a batch of solves, and the failures before and between them."""
        recorded = batch()
        self._records += recorded.records
        self.rollouts += [] if recorded.rollouts is None else [recorded.rollouts]
        self._write_waiting()

    def write_rest(self) -> None:
        """Write the failures behind the last record."""
        self._write_waiting()
        assert not self._waiting, "an input is neither recorded nor failed"

    def _write_waiting(self) -> None:
        before = self._written
        while self._waiting:
            index, outcome = self._waiting[0]
            if not isinstance(outcome, RenderedInput):
                place = index - self._shard.first_index
                self._writer.fail(self._maker.note(self._shard.input_ids[place], index, outcome))
                self.failed.append(place)
            elif self._records:
                self._writer.add(*self._records.popleft())
            else:
                break
            self._waiting.popleft()
            self._written += 1
        if self._written > before == 0:
            self._maker.expect(self._shard, self._written)
        self._progress.update(self._written - before, failed=self._maker.failed)


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
