"""Stopping on request: SIGTERM (Slurm, Kubernetes) and SIGINT finish the unit of work and commit."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from common.errors import Stopped


class StopFlag:
    """A context in which the first SIGTERM or SIGINT sets a flag and a second one raises `Stopped` at once."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():  # handlers can be set nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested:
            raise Stopped(
                f"stopped by a second {signal.Signals(number).name}; what was committed is kept: run again"
            )
        self.stop_requested = True

    def raise_if_requested(self, done: str) -> None:
        """Raise `Stopped` if a signal came.

        Args:
            done: what is committed, for the message, e.g. "12 of 40 shards are committed".
        """
        if self.stop_requested:
            raise Stopped(f"stopped by a signal; {done}: run the same command again to go on")
