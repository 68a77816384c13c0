"""Durable files: a name either holds the whole content or does not exist, also after a crash."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from common.errors import UsageError
from common.faults import naming

logger = logging.getLogger(__name__)

TEMPORARY_SUFFIX = ".tmp"
"""Files with this suffix are leftovers of dead writers unless one is running; they are never read."""


NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""What the system says of a lock on a file system without locks."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What the system says of a hard link on a file system without."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def canonical_json(value: Any) -> bytes:
    """Serialise to the one JSON spelling that is hashed and compared: sorted keys, no spaces, final newline.

    Raises:
        ValueError: a float is NaN or infinite.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def require_suffix(path: Path, *suffixes: str, option: str = "--out") -> None:
    """Refuse a name that says another format than what would be written.

    Args:
        path: of the file to be.
        *suffixes: in lower case, with their dots.
        option: that the name was given by.

    Raises:
        UsageError: the name ends otherwise.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(
            f"{option} {path}: received {f'a {path.suffix} file' if path.suffix else 'a name without extension'},"
            f" expected {' or '.join(suffixes)}, which is what would be in it; give such a name"
        )


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LFS_HEADER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that git-lfs put in another one's place."""


def is_lfs_pointer(path: Path) -> bool:
    """Tell whether a file is only git-lfs's pointer to its content; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_HEADER)) == LFS_HEADER
    except OSError:
        return False


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes; an error of the disk names the file, also once it is open."""
    with naming(path):
        return path.read_bytes()


def fsync_dir(path: Path) -> None:
    """Make renames and new names inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """Return a fresh hidden name in the same folder (same file system, so a rename is atomic).

    It says which machine and which process made it, so that a leftover of a dead process can be told from a living
    one's file.
    """
    return path.with_name(f".{path.name}.{machine_name()}.{process_token()}-{next(_NUMBERS)}{TEMPORARY_SUFFIX}")


def process_token() -> str:
    """Return twelve hexadecimal digits that no other process has, forked ones included."""
    return _TOKEN[0]


_TOKEN = [uuid.uuid4().hex[:12]]
_NUMBERS = itertools.count()


@lru_cache(maxsize=1)
def machine_name() -> str:
    """Name this machine, since it was started, without characters that mean something in a file name.

    Machines and containers may share a host's name: the start tells them apart. What two processes of equal name
    lock, each sees of the other.
    """
    try:
        started = _BOOT_ID.read_text().strip()[:8]
    except OSError:
        started = ""
    name = "".join(c if c.isalnum() or c == "-" else "-" for c in socket.gethostname()) or "machine"
    return f"{name}-{started}" if started else name


def claim(descriptor: int) -> bool:
    """Lock an open file without waiting; the kernel lets go when the process ends, however it ends.

    Returns:
        False if another process holds it, if only to look whether anybody does. A file system without locks grants
        every claim.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def is_locked(path: Path) -> bool | None:
    """Tell whether a process holds a file's lock.

    Returns:
        None where the file system has no locks: nothing is known then.

    Raises:
        FileNotFoundError: there is no such file.
    """
    descriptor = os.open(path, os.O_RDONLY)  # also for who may only look
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    finally:
        os.close(descriptor)
    return False


@contextmanager
def hold(path: Path) -> Iterator[bool]:
    """Claim a file, made if missing, for as long as the context lasts and this process lives.

    Processes forked meanwhile let go of it at once: a lock goes with the last descriptor, and they may outlive
    this process by a moment.

    Yields:
        False if another process holds it.
    """
    with path.open("ab") as lock:
        _HELD.add(lock.fileno())
        try:
            yield claim(lock.fileno())
        finally:
            _HELD.remove(lock.fileno())


_HELD: set[int] = set()


def _let_go() -> None:
    """Point the descriptors elsewhere; closed, their numbers would come to mean another file."""
    if _HELD:
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor in _HELD:
            os.dup2(nothing, descriptor)
        os.close(nothing)
        _HELD.clear()


def _become_another() -> None:
    _TOKEN[0] = uuid.uuid4().hex[:12]
    _let_go()


os.register_at_fork(after_in_child=_become_another)


def open_temporary(path: Path) -> tuple[Path, IO[bytes]]:
    """Make a temporary file that is locked for as long as it is open: who removes leftovers lets it be.

    In its first instant another process may look at it, and so hold its lock, or even take it for a dead writer's
    and remove it: then another one is made.

    Args:
        path: the name to be, also for errors of the disk.

    Returns:
        The temporary name, and the file, open for writing and reading back.
    """
    while True:
        temporary = temporary_path(path)
        with naming(path, temporary=temporary):
            file = temporary.open("x+b")
        if claim(file.fileno()) and temporary.exists():
            return temporary, file
        file.close()
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_file(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Keep a file of `open_temporary` until the context ends; give it its name within.

    What still has the temporary name afterwards is removed.

    Args:
        path: the name to be, also for errors of the disk.

    Yields:
        The temporary name, and the file, open for writing and reading back.
    """
    temporary, file = open_temporary(path)
    try:
        with naming(path, temporary=temporary), file:
            yield temporary, file
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name only when complete and on disk.

    Yields:
        A binary file open for writing (and reading back). On an exception nothing is left behind and
        what stood under the name before is untouched.
    """
    with temporary_file(path) as (temporary, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)
    fsync_dir(path.parent)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write bytes with `atomic_write`."""
    with atomic_write(path) as file:
        file.write(data)


def create_once(path: Path, data: bytes) -> bool:
    """Create a file unless it exists, complete from its first instant; safe against racing processes.

    A finished temporary file is hard-linked to the name, which fails if the name is taken.

    Returns:
        True if this call created it, False if it already existed (it is then left as it is).
    """
    with temporary_file(path) as (temporary, file):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if not link_new(temporary, path):
            return False
    fsync_dir(path.parent)
    return True


def link_new(temporary: Path, path: Path) -> bool:
    """Give a finished file its name, unless the name is taken; of racing processes one succeeds.

    A file system without hard links gets a look and a rename, between which another process may come: it has then
    replaced an equal file, or what readers check by its hash.

    Args:
        temporary: on disk as a whole, in the same folder; it keeps its own name too, where there are links.
        path: the name.

    Returns:
        False if the name was taken.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        logger.debug("%s: no hard links here (%s)", path.parent, error)
        if path.exists():
            return False
        temporary.rename(path)
    return True
