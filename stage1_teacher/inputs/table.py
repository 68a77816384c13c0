"""Where every input of a file lies: read whole from the file once, kept as columns, and looked up by id.

A stored table is a header line, then four columns of `rows` numbers each and one more: ids (16 bytes), offsets
(uint64), lengths (uint32), numbers in the file (uint32), and the rows in the order of their ids (uint32), all
little-endian. It is read where it is asked for and nowhere else: 32 bytes an input stay on the disk.
"""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from common.errors import DataError
from common.faults import naming
from common.files import atomic_write, canonical_json
from stage1_teacher.inputs.input import ID_DIGITS

ID_BYTES = ID_DIGITS // 2
_COLUMNS = (ID_BYTES, 8, 4, 4, 4)
"""Bytes a row of: ids, offsets, lengths, numbers, rows in the order of their ids."""
_SCHEMA = 1
_HEADER_BYTES = 1 << 20
_CHUNK_ROWS = 1 << 16


class Place(Protocol):
    """Where the inputs of one file lie."""

    header: dict[str, Any]
    """What else the file says, and what was noticed in it."""

    def __len__(self) -> int: ...

    def digest(self, row: int) -> bytes:
        """Return an input's id, 16 bytes."""

    def where(self, row: int) -> tuple[int, int, int]:
        """Return an input's byte offset and length in the file, and its number there."""

    def find(self, digest: bytes) -> int | None:
        """Return the first row with an id, None if there is none."""

    def digests(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return all ids, (rows, 16)."""

    def forget(self) -> None:
        """Let the file be read anew by the next run: it is not what it was."""


@dataclass(slots=True)
class Table:
    """A file's inputs in memory, while it is read."""

    header: dict[str, Any] = field(default_factory=dict)
    complete: bool = True
    """Whether all of the file was read."""
    _ids: bytearray = field(default_factory=bytearray)
    _offsets: array[int] = field(default_factory=lambda: array("Q"))
    _lengths: array[int] = field(default_factory=lambda: array("I"))
    _numbers: array[int] = field(default_factory=lambda: array("I"))

    def add(self, input_id: str, offset: int, length: int, number: int) -> None:
        """Append an input."""
        self._ids += bytes.fromhex(input_id)
        self._offsets.append(offset)
        self._lengths.append(length)
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._offsets)

    def digest(self, row: int) -> bytes:
        """See `Place`."""
        return bytes(self._ids[row * ID_BYTES : (row + 1) * ID_BYTES])

    def where(self, row: int) -> tuple[int, int, int]:
        """See `Place`."""
        return self._offsets[row], self._lengths[row], self._numbers[row]

    def find(self, digest: bytes) -> int | None:
        """See `Place`; looks at every row."""
        return next((row for row in range(len(self)) if self.digest(row) == digest), None)

    def digests(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """See `Place`."""
        return np.frombuffer(bytes(self._ids), np.uint8).reshape(-1, ID_BYTES)

    def forget(self) -> None:
        """See `Place`."""

    def write(self, file: IO[bytes], key: dict[str, Any]) -> None:
        """Store the table.

        Args:
            file: open for writing.
            key: of the file that was read, and how.
        """
        rows = len(self)
        about = {"schema": _SCHEMA, "key": key, "rows": rows, "complete": self.complete, "header": self.header}
        file.write(canonical_json(about))
        order = order_of(np.frombuffer(self._ids, np.uint8).reshape(-1, ID_BYTES)).astype("<u4")
        file.write(self._ids)
        for column, kind in ((self._offsets, "<u8"), (self._lengths, "<u4"), (self._numbers, "<u4")):
            file.write(np.asarray(column).astype(kind, copy=False).data)
        file.write(order.data)


class StoredTable:
    """A table on disk."""

    def __init__(self, path: Path) -> None:
        """Open one.

        Raises:
            DataError: it is damaged.
            FileNotFoundError: there is none.
        """
        self.path = path
        with naming(path):
            self._file = path.open("rb", buffering=0)
            line = os.pread(self._file.fileno(), _HEADER_BYTES, 0).partition(b"\n")[0]
            size = os.fstat(self._file.fileno()).st_size
        try:
            about = json.loads(line)
            self.key, self.header = dict(about["key"]), dict(about["header"])
            self.complete, self._rows = bool(about["complete"]), int(about["rows"])
            intact = about["schema"] == _SCHEMA
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact or size != len(line) + 1 + self._rows * sum(_COLUMNS):
            raise DataError(f"{path}: damaged; delete it, and the input file is read again")
        starts = [len(line) + 1]
        for width in _COLUMNS:
            starts.append(starts[-1] + width * self._rows)
        self._starts = starts

    def __len__(self) -> int:
        return self._rows

    def _read(self, column: int, row: int) -> bytes:
        width = _COLUMNS[column]
        with naming(self.path):
            return os.pread(self._file.fileno(), width, self._starts[column] + row * width)

    def digest(self, row: int) -> bytes:
        """See `Place`."""
        return self._read(0, row)

    def where(self, row: int) -> tuple[int, int, int]:
        """See `Place`."""
        offset, length, number = (int.from_bytes(self._read(column, row), "little") for column in (1, 2, 3))
        return offset, length, number

    def _ordered(self, place: int) -> int:
        return int.from_bytes(self._read(4, place), "little")

    def find(self, digest: bytes) -> int | None:
        """See `Place`."""
        place = bisect_left(range(self._rows), digest, key=lambda i: self.digest(self._ordered(i)))
        if place == self._rows:
            return None
        row = self._ordered(place)
        return row if self.digest(row) == digest else None

    def digests(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """See `Place`."""
        with naming(self.path):
            ids = np.fromfile(self.path, np.uint8, self._rows * ID_BYTES, offset=self._starts[0])
        return ids.reshape(-1, ID_BYTES)

    def forget(self) -> None:
        """See `Place`."""
        self.path.unlink(missing_ok=True)


def store(table: Table, path: Path, key: dict[str, Any]) -> None:
    """Write a table under its name, complete from its first instant."""
    with atomic_write(path) as file:
        table.write(file, key)


def order_of(digests: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the rows of ids, (rows, 16) bytes, in the order of ids; equal ones in the order of rows."""
    if not len(digests):
        return np.zeros(0, np.int64)
    words = np.ascontiguousarray(digests).view(">u8").astype(np.uint64)  # (rows, 2)
    return np.lexsort((words[:, 1], words[:, 0]))


def first_of_equals(digests: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Tell which rows of ids, (rows, 16) bytes, are the first with their id."""
    order = order_of(digests)
    first = np.ones(len(digests), np.bool_)
    for start in range(1, len(order), _CHUNK_ROWS):
        rows = order[start - 1 : start + _CHUNK_ROWS]
        first[rows[1:]] = (digests[rows[1:]] != digests[rows[:-1]]).any(axis=1)
    return first
