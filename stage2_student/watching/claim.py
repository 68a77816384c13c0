"""One watcher at a time for a run's folder, also where several machines share it.

A watcher holds the lock of a file, which the kernel lets go of however the process ends, and keeps a second file
that says who it is and is touched every few seconds. Where locks do not reach from machine to machine, that file
alone tells: one that another machine made and nobody touches any more is a dead watcher's. Ages are taken from the
file system's own clock, so that machines need not agree on the time.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import MachineError, UsageError
from common.files import canonical_json, create_once, hold, machine_name, temporary_path

logger = logging.getLogger(__name__)

LOCK_FILE, OWNER_FILE = ".lock", "watcher.json"
TOUCH_SECONDS = 10.0
"""A watcher touches its file this often."""
SILENT_SECONDS = 120.0
"""After so long without a touch another machine's watcher counts as dead."""


class Claim:
    """That this process watches a run, for as long as nobody took it for dead."""

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token

    def require(self) -> None:
        """Make sure that this process still is the one that watches; asked before anything is written.

        Raises:
            MachineError: it was silent for so long that another one took over.
        """
        owner = _read(self._path)
        if owner.get("token") != self._token:
            raise MachineError(
                f"{self._path.parent}: {_who(owner)} took over, as this process said nothing for"
                f" {SILENT_SECONDS:g} s (was it suspended, or the disk away?); what was measured is kept"
            )

    def touch(self) -> None:
        """Say that this process lives; a disk that is away for a moment is no reason to end."""
        try:
            if _read(self._path).get("token") == self._token:
                os.utime(self._path)
        except OSError as error:
            logger.debug("%s: %s", self._path, error)

    def release(self) -> None:
        """Leave the folder to others."""
        if _read(self._path).get("token") == self._token:
            self._path.unlink(missing_ok=True)


@contextmanager
def claim_run(folder: Path, silent_seconds: float = SILENT_SECONDS) -> Iterator[Claim]:
    """Keep other watchers out for as long as the context lasts and this process lives.

    Args:
        folder: where watchers of the run keep their files; made if missing.
        silent_seconds: see `SILENT_SECONDS`.

    Raises:
        UsageError: somebody watches the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / OWNER_FILE
    with hold(folder / LOCK_FILE) as held:
        owner = _read(path)
        if not held or _lives(path, owner, silent_seconds):
            raise UsageError(
                f"{folder.parent}: {_who(owner)} watches it already; its page is {folder / 'index.html'}: end that"
                " watcher to start another"
            )
        claim = Claim(path, _take(path, owner))
        done = threading.Event()
        thread = threading.Thread(target=_keep_touching, args=(claim, done), daemon=True)
        thread.start()
        try:
            claim.require()
            yield claim
        finally:
            done.set()
            thread.join()
            claim.release()


def _keep_touching(claim: Claim, done: threading.Event) -> None:
    while not done.wait(TOUCH_SECONDS):
        claim.touch()


def _lives(path: Path, owner: dict[str, Any], silent_seconds: float) -> bool:
    """Tell whether a watcher of another machine is alive; of one of this machine the lock has told."""
    if not owner or owner.get("machine") == machine_name():
        return False
    return _age(path) < silent_seconds


def _age(path: Path) -> float:
    """Return the seconds since a file was touched, by the clock of its file system."""
    probe = temporary_path(path)
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


def _take(path: Path, dead: dict[str, Any]) -> str:
    """Put this process in a dead watcher's place, or in an empty one; return what it is known by."""
    token = uuid.uuid4().hex
    if path.exists():
        logger.info("%s: takes the place of %s which is gone", path.parent.parent, _who(dead))
        aside = temporary_path(path)
        path.replace(aside)
        if _read(aside).get("token") != dead.get("token"):  # another one was as quick: it stays
            aside.replace(path)
        aside.unlink(missing_ok=True)
    content = {
        "machine": machine_name(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": token,
    }
    if not create_once(path, canonical_json(content)):
        raise UsageError(f"{path.parent.parent}: {_who(_read(path))} watches it already, begun this moment")
    return token


def _read(path: Path) -> dict[str, Any]:
    """Return who watches; nothing if nobody does, or if a crash tore what it said."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _who(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('machine')}, since {owner.get('since')},"
