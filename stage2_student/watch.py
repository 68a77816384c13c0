"""Watching a run: each of its checkpoints sampled and measured on held-out records, in a process of its own.

`train` needs no VAE, judge or teacher for it, and is never waited for: the two share nothing but the run's folder.

RUN/watch/log.jsonl      a line for each checkpoint, see `watching.log`
RUN/watch/index.html     curves and images; reloads itself
RUN/watch/strip.png      the images alone: a row for each record, the teacher's solve, then a column for each step
RUN/watch/runs/          every single result, as `evaluate` keeps them
RUN/watch/tensorboard/   the figures, as a run of its own beside training's; likewise for other trackers
RUN/best                 the adapter of lowest endpoint error, see `watching.best`
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.config import Config
from common.errors import DataError, MachineError
from common.signals import StopFlag
from stage2_student.evaluation.results import read_description
from stage2_student.evaluation.table import RunRow
from stage2_student.report.data import CONFIG_FILE, read_training
from stage2_student.report.words import interval, percent
from stage2_student.training.runlog import read_log
from stage2_student.training.trackers import Trackers, require_trackers
from stage2_student.watching import gallery
from stage2_student.watching.best import BestKeeper, require_own
from stage2_student.watching.checkpoints import Candidate, find_candidates
from stage2_student.watching.claim import Claim, claim_run
from stage2_student.watching.log import Measured, append_measured, best_of, read_measured
from stage2_student.watching.measuring import Measuring
from stage2_student.watching.page import PAGE_FILE, PageData, write_page

logger = logging.getLogger(__name__)

WATCH_DIR = "watch"
"""In a run's folder."""
PAGE_STEPS = 8
"""Checkpoints whose images are on the page."""
POLL_SECONDS, REMIND_SECONDS, NAP_SECONDS = 5.0, 600.0, 0.25
"""Between looks at the run's folder; between lines that say what is waited for; between looks at the stop flag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchResult:
    """What watching a run came to."""

    page: Path
    """The HTML file."""
    measured: tuple[Measured, ...]
    """Of every checkpoint, also by watchers before this one; by step."""
    new: int
    """How many of them this call measured."""
    best: Measured | None
    """What RUN/best holds; None if nothing."""


def watch(
    config: Config,
    run: Path,
    *,
    held_out: str,
    records: int = 32,
    once: bool = False,
    poll_seconds: float = POLL_SECONDS,
) -> WatchResult:
    """Measure every checkpoint of a run, those that are there and those to come, until training is done.

    Args:
        config: model and evaluate are used.
        run: the run's folder; it need not be there yet.
        held_out: folder or URL of a held-out set.
        records: how many of its records to measure on, the first ones.
        once: end when everything that is there is measured.
        poll_seconds: between looks at the run's folder.

    Raises:
        UsageError: somebody watches the run already, or there is no judge, or no such tracker.
        DataError: the set, the checkpoint with the VAE, or an adapter is wrong.
        Stopped: a signal came; what was measured is kept.
    """
    if once and not run.is_dir():
        raise DataError(
            f"{run}: no such run; give the folder that train writes to, or leave --once out to wait for it"
        )
    require_trackers(config.train.trackers)
    require_own(run)
    folder = run / WATCH_DIR
    with claim_run(folder) as claim:
        measuring = Measuring(config, held_out, records, folder)
        with StopFlag() as stop, closing(_open_trackers(config, run)) as trackers:
            watcher = _Watcher(run, claim, measuring, stop, trackers, config.evaluate.judge)
            watcher.go(once, poll_seconds)
            return watcher.result()


def _open_trackers(config: Config, run: Path) -> Trackers:
    """Start the trackers, and send what the last watcher may not have come to send."""
    before = read_measured(run / WATCH_DIR)[-1:]
    step = before[0].step - 1 if before else 0
    trackers = Trackers(run / WATCH_DIR, config, step, title=f"{run.resolve().name}-{WATCH_DIR}")
    for one in before:
        trackers.log(one.step, one.figures())
    return trackers


class _Watcher:
    """One watcher's work."""

    def __init__(
        self, run: Path, claim: Claim, measuring: Measuring, stop: StopFlag, trackers: Trackers, judge: str
    ) -> None:
        self._run, self._folder = run, run / WATCH_DIR
        self._claim, self._measuring, self._stop = claim, measuring, stop
        self._trackers, self._judge = trackers, judge
        self._best = BestKeeper(run, self._folder)
        self._held: Measured | None = None
        self._skipped: dict[str, object] = {}  # stamps of what was left out, by identity
        self._new = 0
        self._teacher: RunRow = measuring.teacher(stop)
        self._measured = read_measured(self._folder)

    def go(self, once: bool, poll_seconds: float) -> None:
        """Measure what there is, wait, and measure what comes."""
        self._show()  # of a watcher that died between a line and what is made of it
        reminded = -REMIND_SECONDS
        while True:
            while left := self._left():
                self._measure_next(left)
            if once or self._is_finished():
                return
            if time.monotonic() - reminded >= REMIND_SECONDS:
                reminded = time.monotonic()
                logger.info("%s", self._waiting_for())
            self._wait(poll_seconds)

    def result(self) -> WatchResult:
        """Return what it came to."""
        return WatchResult(
            page=self._folder / PAGE_FILE, measured=tuple(self._measured), new=self._new, best=self._held
        )

    def _left(self) -> list[Candidate]:
        """List what is not measured yet, those of few steps first: they are the first to vanish."""
        done = {one.adapter for one in self._measured}
        return [
            one
            for one in find_candidates(self._run)
            if one.identity not in done
            and (one.identity not in self._skipped or one.stamp() != self._skipped[one.identity])
        ]

    def _measure_next(self, left: Sequence[Candidate]) -> None:
        candidate = left[0]
        self._stop.raise_if_requested(f"{len(self._measured)} checkpoints are measured, {len(left)} are left")
        stamp, measured = candidate.stamp(), self._try(candidate)
        if measured is None:
            self._skipped[candidate.identity] = stamp
            return
        self._claim.require()
        append_measured(self._folder, measured)
        self._measured = read_measured(self._folder)
        self._new += 1
        self._trackers.log(measured.step, measured.figures())
        self._show()
        logger.info("%s; %d left", self._describe(measured), len(left) - 1)

    def _try(self, candidate: Candidate) -> Measured | None:
        """Measure a checkpoint; None, with a word, if it vanished meanwhile or is damaged."""
        try:
            if damage := candidate.damage():
                if not candidate.is_gone():
                    logger.warning("step %d: damaged and left out: %s", candidate.step, damage)
                    return None
                raise FileNotFoundError
            return self._measuring.measure(candidate, self._stop)
        except (DataError, MachineError, OSError):
            if not candidate.is_gone():
                raise
            logger.warning(
                "step %d: vanished while it was read, and is left out; train keeps train.keep_checkpoints of them",
                candidate.step,
            )
            return None

    def _show(self) -> None:
        """Bring best, strip and page up to what is in the log; done again, it changes nothing."""
        self._claim.require()
        self._held = self._best.keep(self._measured, find_candidates(self._run))
        layouts = self._measuring.layouts[: gallery.ROWS]
        strip = gallery.choose(self._measured, gallery.STRIP_STEPS)
        gallery.write_strip(self._folder, gallery.columns(self._folder, self._teacher.folder, strip, layouts))
        shown = gallery.choose(self._measured, PAGE_STEPS)
        rows = gallery.columns(self._folder, self._teacher.folder, shown, layouts)
        has_loss = any(line.get("loss") is not None for line in read_log(self._run))
        data = PageData(
            run=self._run,
            max_steps=self._max_steps(),
            finished=self._is_finished(),
            records=len(self._measuring.layouts),
            judge=self._judge,
            teacher=self._teacher,
            measured=self._measured,
            held=self._held,
            gallery=list(zip(layouts, rows, strict=True)),
            training=read_training(self._run) if has_loss else None,
            updated=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        )
        write_page(self._folder, data)

    def _is_finished(self) -> bool:
        """Whether training reached its last step, and everything is measured."""
        last, candidates = self._max_steps(), find_candidates(self._run)
        return last is not None and any(one.step >= last for one in candidates) and not self._left()

    def _max_steps(self) -> int | None:
        """Return how many steps the run's training will do, as its folder says; None if it has not begun."""
        path = self._run / CONFIG_FILE
        if not path.exists():
            return None
        try:
            return int(read_description(path)["train"]["max_steps"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: not the configuration of a training; restore it") from None

    def _wait(self, seconds: float) -> None:
        """Wait, and end on a signal.

        Raises:
            Stopped: a signal came.
        """
        until = time.monotonic() + seconds
        while True:
            self._stop.raise_if_requested(f"{len(self._measured)} checkpoints are measured, none is left")
            if (left := until - time.monotonic()) <= 0:
                return
            time.sleep(min(left, NAP_SECONDS))

    def _waiting_for(self) -> str:
        steps = [one.step for one in find_candidates(self._run)]
        of = f" of {last}" if (last := self._max_steps()) else ""
        return (
            f"{self._run}: waits for {f'what follows step {steps[-1]}{of}' if steps else 'its first checkpoint'}"
        )

    def _describe(self, one: Measured) -> str:
        error = one.endpoint_error
        parts = [f"step {one.step}: endpoint error {error.value:.4g} ({interval(error, 1, 4)})"]
        if one.sen_acc is not None:
            parts.append(f"Sen. Acc {percent(one.sen_acc)} (teacher {percent(self._teacher.sen_acc)})")
        if one.color is not None:
            parts.append(f"colour ΔE {one.color.value:.1f} over {one.color.count} lines")
        if one == best_of(self._measured):
            parts.append("the best so far")
        return ", ".join(parts)
