"""Durable files: a name either holds the whole content or does not exist, also after a crash."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from common.faults import naming

TEMPORARY_SUFFIX = ".tmp"
"""Files with this suffix are leftovers of dead writers unless one is running; they are never read."""


def canonical_json(value: Any) -> bytes:
    """Serialise to the one JSON spelling that is hashed and compared: sorted keys, no spaces, final newline.

    Raises:
        ValueError: a float is NaN or infinite.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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

    It says which machine made it, so that a leftover of a dead process can be told from a living one's file.
    """
    return path.with_name(f".{path.name}.{machine_name()}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")


def machine_name() -> str:
    """Return this machine's name without characters that mean something in a file name."""
    return "".join(c if c.isalnum() or c == "-" else "-" for c in socket.gethostname()) or "machine"


def claim(descriptor: int) -> bool:
    """Lock an open file without waiting; the kernel lets go when the process ends, however it ends.

    Returns:
        False if another process holds it. A file system without locks grants every claim.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
    return True


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name only when complete and on disk.

    Yields:
        A binary file open for writing (and reading back). On an exception nothing is left behind and
        what stood under the name before is untouched.
    """
    temporary = temporary_path(path)
    try:
        with naming(path, temporary=temporary):
            with temporary.open("w+b") as file:
                claim(file.fileno())
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
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
    temporary = temporary_path(path)
    try:
        with naming(path, temporary=temporary):
            with temporary.open("wb") as file:
                claim(file.fileno())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)
    return True
