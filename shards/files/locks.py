"""Temporary files of writers: how they are named and locked, and how those of dead runs are told from living ones.

A writer holds an advisory lock on its temporary file for as long as it lives; the kernel lets go of it however
the process ends. So a temporary file whose lock is free belongs to nobody. Locks may not reach across machines
on every network file system, so a file that another machine made is only taken for dead after a day without a
write.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.files import NO_LOCKS, TEMPORARY_SUFFIX, claim, machine_name
from shards.files.names import FAILURES_DIR, PLAN_DIR

logger = logging.getLogger(__name__)

FOREIGN_SECONDS = 24 * 3600.0
"""After this long without a write another machine's temporary file counts as dead."""

LOCK_SECONDS = 5.0
"""A writer locks its file before it writes to it, this soon after making it."""


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold a file's lock, wait for it if need be; the file is made if missing."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s: this file system has no locks; do not give one shard to two tasks", path.parent)
        yield
    finally:
        os.close(descriptor)


def temporaries(folder: Path) -> list[Path]:
    """List all temporary files of a set, of the living and the dead."""
    folders = [folder, folder / PLAN_DIR, folder / FAILURES_DIR]
    return sorted(path for place in folders for path in place.glob(f".*{TEMPORARY_SUFFIX}"))


def is_dead(path: Path) -> bool:
    """Tell whether the writer of a temporary file is gone; a file that just vanished counts as alive."""
    return _with_dead(path, lambda: None)


def remove_leftovers(folder: Path) -> list[str]:
    """Delete the temporary files of dead runs.

    Returns:
        Their names.
    """
    removed = [path.name for path in temporaries(folder) if _with_dead(path, path.unlink)]
    if removed:
        logger.info("%s: removed %d temporary files of dead runs", folder, len(removed))
    return removed


def _with_dead(path: Path, action: Callable[[], None]) -> bool:
    """Do something with a temporary file while holding its lock, if nobody else holds it."""
    try:
        status = path.stat()
        age = time.time() - status.st_mtime
        if f".{machine_name()}." not in path.name and age < FOREIGN_SECONDS:
            return False
        if status.st_size == 0 and age < LOCK_SECONDS:
            return False
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        if not claim(descriptor):
            return False
        action()
        return True
    finally:
        os.close(descriptor)
