"""Files of one JSON value a line, appended to by a process that may die: only a line that has its end counts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from common.faults import naming
from common.files import canonical_json, read_bytes

T = TypeVar("T")


def read_lines(path: Path) -> list[bytes]:
    """Return a file's complete lines, none if there is no file; a last line that a crash tore is left out."""
    return _complete(path).split(b"\n")[:-1] if path.exists() else []


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects among a file's complete lines; a line that is none is left out."""
    found = []
    for line in read_lines(path):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


class LineWriter(Generic[T]):
    """Appends values to a file of lines; a context manager."""

    def __init__(
        self, path: Path, *, encode: Callable[[T], bytes] = canonical_json, durable: bool = False
    ) -> None:
        """Open a file to go on with; a torn last line is cut off.

        Args:
            path: made if missing, with its folder.
            encode: a value to its line, with the line's end.
            durable: what `append` returned from is on disk, not only handed to the system.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._encode, self._durable = path, encode, durable
        self._file = path.open("ab")
        self._file.truncate(len(_complete(path)))

    def __enter__(self) -> LineWriter[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def append(self, *values: T) -> None:
        """Write values, each on a line."""
        with naming(self._path):
            self._file.write(b"".join(map(self._encode, values)))
            self._file.flush()
            if self._durable:
                os.fsync(self._file.fileno())


def _complete(path: Path) -> bytes:
    data = read_bytes(path)
    return data[: data.rfind(b"\n") + 1]
