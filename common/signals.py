"""Stopping on request: SIGTERM, SIGINT, SIGHUP and SIGUSR1 finish the unit of work and commit.

Slurm and Kubernetes send SIGTERM, Slurm's `--signal` mostly SIGUSR1, a terminal that closes SIGHUP. A signal that
was ignored when the process started (SIGHUP under nohup, SIGINT of a script's background jobs) stays ignored.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from common.errors import Stopped

STOPS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
"""Signals that ask a process to stop."""
REPEAT_SECONDS = 5.0
"""So soon after the first a signal is the same request: a launcher passes on what its whole group was sent."""


def end_at_once() -> None:
    """Let a signal end the process with 75 at once: for as long as there is nothing to commit, imports included.

    Set explicitly, for PID 1 of a container is not ended by a signal that it does not handle. `StopFlag` takes
    over where there is something to commit, and gives back.
    """
    _handle_all(_end)


def _end(number: int, frame: FrameType | None) -> None:
    message = (
        f"error: stopped by {signal.Signals(number).name} with nothing to commit: run the same command again\n"
    )
    os.write(2, message.encode())
    if not _passes_an_exception_on(frame):
        os._exit(Stopped.exit_code)
    raise SystemExit(Stopped.exit_code)


def _passes_an_exception_on(frame: FrameType | None) -> bool:
    """Tell whether an exception would reach the top.

    Not in an import, which may take it for a library that is missing, nor in what Python calls last of all.
    """
    name = ""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return False
        name, frame = frame.f_code.co_name, frame.f_back
    return name in ("<module>", "_run_module_as_main")


def _handle_all(handler: Any) -> dict[int, Any]:
    """Set a handler for every signal of STOPS that is not ignored; return what was there before."""
    if threading.current_thread() is not threading.main_thread():  # handlers can be set nowhere else
        return {}
    asked = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in asked}


@contextmanager
def interrupted_quietly() -> Iterator[None]:
    """Let Ctrl-C end what only looks, as something that is done."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def blocked() -> Iterator[None]:
    """Keep the signals of STOPS back for as long as processes are started, which inherit that; then they come."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopFlag:
    """A context in which the first signal of STOPS sets a flag; one 5 seconds later or more raises `Stopped`."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._first = 0.0  # when the first signal came
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        self._previous = _handle_all(self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            if handler is not _end or not self.stop_requested:  # else it is ending already, and says why
                signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.stop_requested:
            self.stop_requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first >= REPEAT_SECONDS:
            raise Stopped(
                f"stopped by a second {signal.Signals(number).name}; what was committed is kept: run again"
            )

    def raise_if_requested(self, done: str) -> None:
        """Raise `Stopped` if a signal came.

        Args:
            done: what is committed, for the message, e.g. "12 of 40 shards are committed".
        """
        if self.stop_requested:
            raise Stopped(f"stopped by a signal; {done}: run the same command again to go on")
