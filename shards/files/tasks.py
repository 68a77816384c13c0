"""Tasks that work on one set: each leaves a note that it lives, and claims what it works on.

Claims save work and no more: whoever loses one, or has one taken away, does no harm, for a shard's commit does not
ask for it (`writing.writer`).

A task lives as long as the counter in its note moves. Who watches compares it with what it saw before, on its own
clock that only runs forward: the clocks of machines and the times of files on a server say nothing. On one machine
the kernel knows at once: a task holds its note's lock, and lets go of it however it ends.
"""

from __future__ import annotations

import enum
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.files import (
    canonical_json,
    create_once,
    fsync_dir,
    hold,
    is_locked,
    link_new,
    machine_name,
    process_token,
    read_bytes,
    temporary_path,
)
from shards.files.names import CLAIMS_DIR, TASKS_DIR

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
"""Between two steps of a note's counter."""
DEAD_SECONDS = 90.0
"""A note whose counter did not move for so long, on the clock of who watches, is a dead task's."""
_NOTE_BYTES = 1024
"""A note is written over in place, in one piece of this size."""


class State(enum.Enum):
    """What is known of a task."""

    ALIVE = "alive"
    DEAD = "dead"
    UNSURE = "unsure"
    """Not watched for long enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a running task says of itself."""

    token: str
    """Names the task's run."""
    machine: str
    """See `common.files.machine_name`."""
    host: str
    pid: int
    task_index: int
    num_tasks: int
    started: str
    """For people."""
    beats: int
    """Moves while the task lives."""
    shard: str | None
    """In work."""
    committed: int
    """Shards committed by this run."""


class Watch:
    """Remembers what moved, and tells the living from the dead."""

    def __init__(
        self, folder: Path, *, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin to watch a set's tasks.

        Args:
            folder: the set's.
            seconds: without a move after which a task counts as dead; None for DEAD_SECONDS.
            clock: seconds that only grow.
        """
        self._folder, self._clock = folder, clock
        self.seconds = DEAD_SECONDS if seconds is None else seconds
        self._seen: dict[str, tuple[object, float, bool]] = {}  # value, since when, whether it ever moved

    def look(self, key: str, value: object) -> State:
        """Compare a value with what it was when it was looked at before.

        Args:
            key: of what is watched.
            value: anything that changes while its writer lives.
        """
        now = self._clock()
        before, since, moved = self._seen.get(key, (value, now, False))
        if value != before:
            since, moved = now, True
        self._seen[key] = (value, since, moved)
        if now - since >= self.seconds:
            return State.DEAD
        return State.ALIVE if moved else State.UNSURE

    def task(self, token: str, machine: str) -> State:
        """Tell whether a task lives.

        Args:
            token: its note's.
            machine: its machine's name.
        """
        path = note_path(self._folder, token)
        try:
            if machine == machine_name() and (locked := is_locked(path)) is not None:
                return State.ALIVE if locked else State.DEAD
            return self.look(token, read_bytes(path))
        except FileNotFoundError:
            # Another machine may see a new file late, but never for long.
            return State.DEAD if machine == machine_name() else self.look(token, None)

    def process(self, process: str, machine: str) -> State | None:
        """Tell whether one of a process's tasks lives; None if it left no note."""
        notes = (self._folder / TASKS_DIR).glob(f"{process}-*.json")
        states = [self.task(path.stem, machine) for path in notes]
        for state in (State.ALIVE, State.UNSURE, State.DEAD):
            if state in states:
                return state
        return None


def note_path(folder: Path, token: str) -> Path:
    """Return where a task's note lies."""
    return folder / TASKS_DIR / f"{token}.json"


def read_notes(folder: Path) -> list[Note]:
    """Return the notes of a set's tasks, of the living and the dead, in order of task."""
    found = []
    for path in (folder / TASKS_DIR).glob("*.json"):
        with suppress(FileNotFoundError):
            note = decode_note(read_bytes(path))
            found += [] if note is None else [note]
    return sorted(found, key=lambda note: (note.task_index, note.started, note.token))


def decode_note(data: bytes) -> Note | None:
    """Return what a note says, None if it is damaged."""
    try:
        return Note(**json.loads(data))
    except (ValueError, TypeError):
        return None


class Task:
    """A running task of a set; a context manager, which a thread keeps alive in the eyes of others."""

    _runs = 0

    def __init__(self, folder: Path, index: int, count: int, *, watch: Watch | None = None) -> None:
        """Describe the task; its note is made on entering the context.

        Args:
            folder: the set's; made if missing.
            index: 0 to count - 1.
            count: tasks that share the work.
            watch: of the other tasks.
        """
        Task._runs += 1
        self.folder, self.watch = folder, watch or Watch(folder)
        self.note = Note(
            token=f"{process_token()}-{Task._runs}",
            machine=machine_name(),
            host=os.uname().nodename,
            pid=os.getpid(),
            task_index=index,
            num_tasks=count,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            beats=0,
            shard=None,
            committed=0,
        )
        self._claim = canonical_json({"token": self.note.token, "machine": self.note.machine})
        self._held: set[str] = set()
        self._ended, self._writing = threading.Event(), threading.Lock()
        self._living: Any = None

    def __enter__(self) -> Task:
        for name in (TASKS_DIR, CLAIMS_DIR):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._living = _living_note(note_path(self.folder, self.note.token), _encode(self.note))
        self._living.__enter__()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        for name in list(self._held):
            with suppress(OSError):
                self.release(name)
        self._living.__exit__(*exception)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.say()

    def say(self, **changes: Any) -> None:
        """Write the note with a further beat.

        Args:
            **changes: of its fields.
        """
        with self._writing:
            self.note = replace(self.note, beats=self.note.beats + 1, **changes)
            try:
                with note_path(self.folder, self.note.token).open("r+b", buffering=0) as file:
                    file.write(_encode(self.note))
                    os.fsync(file.fileno())
            except OSError as error:  # others may take its work over: that costs time and nothing else
                logger.debug("note of task %d not written: %s", self.note.task_index, error)

    def claim(self, name: str) -> State | None:
        """Claim something to work on: a shard, the index of an input file, the plan.

        Args:
            name: of what is claimed, a file's name.

        Returns:
            None if it is claimed now; else what is known of the task that has it.
        """
        path = self.folder / CLAIMS_DIR / name
        for _attempt in range(3):
            if create_once(path, self._claim):
                self._held.add(name)
                return None
            try:
                data = read_bytes(path)
            except FileNotFoundError:
                continue
            state = State.ALIVE if data == self._claim else claimed_by(self.watch, data)
            if state is not State.DEAD:
                return state
            logger.info("%s: taken over from a task that is gone", name)
            set_aside(path, data)
        return State.UNSURE

    def release(self, name: str) -> None:
        """Give back what is claimed, unless it was taken over."""
        self._held.discard(name)
        set_aside(self.folder / CLAIMS_DIR / name, self._claim)

    @contextmanager
    def claimed(self, name: str, is_done: Callable[[], bool]) -> Iterator[bool]:
        """Let one of many tasks do something, while the others wait until it is done.

        Yields:
            True if this task is to do it; False if another one did.
        """
        wait, told = 0.05, False
        while not is_done():
            if self.claim(name) is None:
                try:
                    yield not is_done()
                finally:
                    self.release(name)
                return
            if not told:
                logger.info("%s: another task makes it; waiting", name)
            told = True
            time.sleep(wait)
            wait = min(2 * wait, 1.0)
        yield False


def claimed_by(watch: Watch, data: bytes) -> State:
    """Tell whether the task lives that made a claim.

    Args:
        watch: of the set's tasks.
        data: the claim's.
    """
    try:
        values = json.loads(data)
        return watch.task(str(values["token"]), str(values["machine"]))
    except (ValueError, KeyError, TypeError):
        return State.DEAD  # no claim of ours


def set_aside(path: Path, expected: bytes) -> bool:
    """Remove a file if it is the one that was judged; another that took its name meanwhile is put back.

    Returns:
        Whether it was removed.
    """
    aside = temporary_path(path)
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    try:
        if read_bytes(aside) == expected:
            return True
        link_new(aside, path)
        return False
    except FileNotFoundError:
        return True  # who removes leftovers took it for one
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _living_note(path: Path, data: bytes) -> Iterator[None]:
    """Keep a note, locked, from its first instant under its name until the context ends."""
    temporary = temporary_path(path)
    try:
        with ExitStack() as held:
            while not (held.enter_context(hold(temporary)) and temporary.exists()):  # as in `open_temporary`
                temporary.unlink(missing_ok=True)
                temporary = temporary_path(path)
            temporary.write_bytes(data)
            temporary.rename(path)
            fsync_dir(path.parent)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(note: Note) -> bytes:
    return canonical_json(asdict(note)).rstrip().ljust(_NOTE_BYTES - 1) + b"\n"
