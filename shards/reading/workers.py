"""Processes that read ahead: they stop for nobody but their parent, outlive it never, and hold nothing of it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from functools import partial
from multiprocessing import popen_fork
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

from common.signals import STOPS

_PR_SET_PDEATHSIG = 1


def worker_options() -> dict[str, Any]:
    """Return how torch's DataLoader is to make its workers; call it where it is iterated, signals `blocked`."""
    if sys.platform != "linux":
        return {"worker_init_fn": partial(_settle, None)}
    return {"worker_init_fn": partial(_settle, _parent()), "multiprocessing_context": _Context()}


def _parent() -> int | None:
    """Return this process, unless a thread of it starts the workers: the kernel takes its end for the parent's."""
    return os.getpid() if threading.current_thread() is threading.main_thread() else None


def _settle(parent: int | None, _worker: int) -> None:
    """Run first in a worker, with signals blocked since before it was forked.

    A signal to the process group or the job asks the parent to stop, which then still needs batches to finish its
    step; and a worker whose parent was killed would hold its memory, its sockets and its terminal.
    """
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    if parent is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before the line above
            os._exit(1)


class _Popen(popen_fork.Popen):
    """A forked process that is ended by what it cannot ignore: it only reads, so nothing is lost."""

    def terminate(self) -> None:
        self.kill()


class _Process(ForkProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802
        return _Popen(process_obj)


class _Context(ForkContext):
    """Forks: the death of the parent is that of the process that forked, which no server stands between."""

    Process = _Process
