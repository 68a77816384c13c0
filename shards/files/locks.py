"""The set's lock, and what writers leave: how temporary files, notes and claims of the dead are told from others.

A writer holds an advisory lock on its temporary file for as long as it lives; the kernel lets go of it however
the process ends. So a temporary file of this machine whose lock is free belongs to nobody. Of another machine's,
or where the file system has no locks, the note of its task says whether it lives (`tasks`); without a note,
whether the file itself changes while it is watched.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.files import NO_LOCKS, TEMPORARY_SUFFIX, is_locked, machine_name, read_bytes
from shards.files.names import CLAIMS_DIR, FAILURES_DIR, INDEX_DIR, PLAN_DIR, PLANNED_DIR, STOPS_DIR, TASKS_DIR
from shards.files.tasks import State, Watch, claimed_by, decode_note, note_path, set_aside

logger = logging.getLogger(__name__)

LOCK_SECONDS = 5.0
"""A writer locks its file before it writes to it, this soon after making it."""

_FOLDERS = ("", PLAN_DIR, FAILURES_DIR, TASKS_DIR, CLAIMS_DIR, STOPS_DIR, INDEX_DIR, PLANNED_DIR)


@contextmanager
def hold_lock(path: Path) -> Iterator[bool]:
    """Hold a file's lock, wait for it if need be; the file is made if missing.

    A file system without locks lets everybody in: what is guarded must be right without, and checked.

    Yields:
        False where there are no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    locked = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.debug("%s: this file system has no locks", path.parent)
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def temporaries(folder: Path) -> list[Path]:
    """List all temporary files of a set, of the living and the dead."""
    return sorted(path for place in _FOLDERS for path in (folder / place).glob(f".*{TEMPORARY_SUFFIX}"))


def state_of(path: Path, watch: Watch, *, local: bool = False) -> State:
    """Tell whether the writer of a temporary file lives; a file that just vanished counts as alive.

    Args:
        path: the file's.
        watch: of the set's tasks.
        local: the folder lies on a disk of this machine, so that its locks tell.
    """
    machine, process = _maker(path)
    try:
        status = path.stat()  # before its lock: who locks and writes in between is not taken for dead
        if (local or machine == machine_name()) and (locked := is_locked(path)) is not None:
            young = status.st_size == 0 and time.time() - status.st_mtime < LOCK_SECONDS
            about_to_lock = young and watch.process(process, machine) is not State.DEAD
            return State.ALIVE if locked or about_to_lock else State.DEAD
        found = watch.process(process, machine)
        if found is not None:
            return found
        return watch.look(path.name, (status.st_size, status.st_mtime_ns))  # compared with itself alone
    except FileNotFoundError:
        return State.ALIVE


def is_dead(path: Path, watch: Watch | None = None) -> bool:
    """Tell whether the writer of a temporary file is gone for certain.

    Args:
        path: the file's.
        watch: that saw the set's tasks before; without, only the dead of this machine are known.
    """
    return state_of(path, watch or Watch(path.parent)) is State.DEAD


def remove_leftovers(folder: Path, watch: Watch | None = None, *, local: bool = False) -> list[str]:
    """Delete what dead tasks left: their temporary files, claims and notes.

    Args:
        folder: the set's.
        watch: that saw the set's tasks before; without, only what the dead of this machine left is removed.
        local: the folder lies on a disk of this machine.

    Returns:
        The names of what was removed.
    """
    watch = watch or Watch(folder)
    notes = _notes_of_the_dead(folder, watch)  # first: what they left was there by now
    removed = [
        path.name for path in temporaries(folder) if _if_dead(state_of(path, watch, local=local), path.unlink)
    ]
    for path in sorted((folder / CLAIMS_DIR).glob("[!.]*")):
        with suppress(FileNotFoundError):
            data = read_bytes(path)
            if claimed_by(watch, data) is State.DEAD and set_aside(path, data):
                removed.append(f"claim of {path.name}")
    for path, name in notes.items():  # last: without its note a file that is still empty counts as a living one's
        path.unlink(missing_ok=True)
        removed.append(name)
    if removed:
        logger.info("%s: removed what dead tasks left: %s", folder, shorten(removed))
    return removed


def _notes_of_the_dead(folder: Path, watch: Watch) -> dict[Path, str]:
    """Return the notes of dead tasks, and what people call them."""
    found = {}
    for path in sorted((folder / TASKS_DIR).glob("*.json")):
        with suppress(FileNotFoundError):
            note = decode_note(read_bytes(path))
            if note is None:
                found[path] = path.name
            elif watch.task(note.token, note.machine) is State.DEAD:
                found[path] = f"note of task {note.task_index} on {note.host}"
    return found


def unsure(folder: Path, watch: Watch) -> list[str]:
    """Name what may be a dead task's, and needs to be watched for longer."""
    found = [path.name for path in temporaries(folder) if state_of(path, watch) is State.UNSURE]
    for path in sorted((folder / TASKS_DIR).glob("*.json")):
        with suppress(FileNotFoundError):
            note = decode_note(read_bytes(path))
            if note is not None and watch.task(note.token, note.machine) is State.UNSURE:
                found.append(note_path(folder, note.token).name)
    for path in sorted((folder / CLAIMS_DIR).glob("[!.]*")):
        with suppress(FileNotFoundError):
            if claimed_by(watch, read_bytes(path)) is State.UNSURE:
                found.append(path.name)
    return found


def shorten(names: list[str], most: int = 5) -> str:
    """List names, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _if_dead(state: State, action: Callable[[], None]) -> bool:
    if state is not State.DEAD:
        return False
    with suppress(FileNotFoundError):
        action()
    return True


def _maker(path: Path) -> tuple[str, str]:
    """Return the machine and the process in a temporary file's name, .NAME.MACHINE.PROCESS-NUMBER.tmp."""
    _name, machine, process = ("", "", *path.name.removesuffix(TEMPORARY_SUFFIX).rsplit(".", 2))[-3:]
    return machine, process.partition("-")[0]
