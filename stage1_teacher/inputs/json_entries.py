"""The entries of a large JSON file, found in one pass and read one at a time afterwards.

AnyWord's files hold millions of entries and gigabytes; parsed whole they take ten times that in memory.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from common.errors import DataError, reason
from common.faults import naming, raise_disk_fault
from stage1_teacher.inputs.input import nearest

_CHUNK_BYTES = 1 << 20
_MAX_VALUE_CHARACTERS = 64 << 20
_AFTER_VALUE = frozenset(" \t\n\r,:]}")
_WHITESPACE = re.compile(r"[ \t\n\r]*")


class _Scanner:
    """Reads JSON tokens from a file, a chunk at a time, and knows each one's byte offset."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text, self._position, self._ended = "", 0, False
        self.offset = 0
        if self._file.read(3) == codecs.BOM_UTF8:
            self.offset = 3
        else:
            self._file.seek(0)

    def close(self) -> None:
        self._file.close()

    def fail(self, what: str) -> DataError:
        return DataError(f"{self._path}, byte {self.offset}: {what}; is the file complete JSON?")

    def peek(self) -> str:
        """Return the next character that is not white space, "" at the end."""
        while True:
            blank = _WHITESPACE.match(self._text, self._position)
            if blank is not None and blank.end() > self._position:
                self._advance(blank.end() - self._position)
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._refill():
                return ""

    def take(self, allowed: str) -> str:
        """Consume one of these characters."""
        character = self.peek()
        if not character or character not in allowed:
            raise self.fail(f"found {character or 'the end'!r}, expected one of {' '.join(allowed)}")
        self._advance(1)
        return character

    def value(self) -> tuple[Any, int, int]:
        """Consume a value; return it with its byte offset and length."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                problem = error.msg
            except (ValueError, RecursionError) as error:
                raise self.fail(f"a value cannot be read ({error})") from None
            else:
                problem = ""
                if self._text[end : end + 1] in _AFTER_VALUE:  # else a number may go on in the next chunk
                    return value, *self._advance(end - self._position)
            if len(self._text) - self._position > _MAX_VALUE_CHARACTERS:
                raise self.fail(f"a value of more than {_MAX_VALUE_CHARACTERS} characters")
            if not self._refill():
                raise self.fail(problem or "the file ends too early")

    def _advance(self, count: int) -> tuple[int, int]:
        begin, taken = self.offset, self._text[self._position : self._position + count]
        length = count if taken.isascii() else len(taken.encode())
        self.offset += length
        self._position += count
        return begin, length

    def _refill(self) -> bool:
        """Append a chunk to what is left, growing so that a long value is not tried too often."""
        if self._ended:
            return False
        self._text = self._text[self._position :]
        self._position = 0
        try:
            chunk = self._file.read(max(_CHUNK_BYTES, len(self._text)))
            self._text += self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise self.fail(f"not UTF-8 ({error.reason})") from None
        self._ended = not chunk
        return True


class JsonList:
    """The members of a list inside a JSON object, found in one pass."""

    def __init__(
        self,
        path: Path,
        *,
        list_field: str,
        other_fields: Collection[str],
        ignored: Collection[str] = (),
        keep: Callable[[int, Any, int, int], bool],
    ) -> None:
        """Say what is looked for.

        Args:
            path: a JSON file that holds one object.
            list_field: the object's field that holds the list.
            other_fields: what else the object must hold.
            ignored: further fields that may stand there unread.
            keep: called with (number in the list, parsed entry, byte offset, length); False ends the reading, once
                all fields were met.
        """
        self._path, self._list_field, self._others, self._keep = path, list_field, other_fields, keep
        self._allowed = {list_field, *other_fields, *ignored}
        self._header: dict[str, Any] = {}

    def scan(self) -> tuple[dict[str, Any], bool]:
        """Read the file.

        Returns:
            The object's other fields, and whether all of the file was read.

        Raises:
            DataError: no such file, not such JSON, an unknown or missing field, or whatever `keep` raises.
        """
        self._header = {}
        try:
            scanner = _Scanner(self._path)
        except OSError as error:
            raise_disk_fault(error, self._path)
            raise DataError(f"{self._path}: {reason(error)}") from None
        with naming(self._path), closing(scanner):
            complete = self._scan_object(scanner)
        for field in (self._list_field, *self._others):
            if field not in self._header:
                raise DataError(f"{self._path}: field {field!r} is missing")
        return {field: value for field, value in self._header.items() if field in self._others}, complete

    def _scan_object(self, scanner: _Scanner) -> bool:
        complete = True
        scanner.take("{")
        while True:
            field = scanner.value()[0]
            if not isinstance(field, str):
                raise scanner.fail(f"found {field!r:.40}, expected a field's name")
            if field not in self._allowed:
                raise DataError(f"{self._path}: unknown field {field!r}; {nearest(field, self._allowed)}")
            scanner.take(":")
            if field == self._list_field:
                self._header[field] = None
                complete = self._scan_list(scanner)
                if not complete and set(self._others) <= self._header.keys():
                    return False
                if not complete:
                    self._skip_list(scanner)
            else:
                self._header[field] = scanner.value()[0]
            if scanner.take(",}") == "}":
                break
        if scanner.peek():
            raise scanner.fail("something follows the object")
        return complete

    def _scan_list(self, scanner: _Scanner) -> bool:
        """Pass over the list, or its beginning; tells whether it came to the end."""
        scanner.take("[")
        if scanner.peek() == "]":
            scanner.take("]")
            return True
        number = 0
        while True:
            entry, offset, length = scanner.value()
            wanted = self._keep(number, entry, offset, length)
            number += 1
            if scanner.take(",]") == "]":
                return True
            if not wanted:
                return False

    @staticmethod
    def _skip_list(scanner: _Scanner) -> None:
        """Pass over the rest of the list: a field that is needed stands behind it."""
        scanner.value()
        while scanner.take(",]") == ",":
            scanner.value()


def read_json(path: Path, file: IO[bytes], offset: int, length: int) -> Any:
    """Read one value of an open file; safe to use from threads.

    Raises:
        ValueError: it is none: the file is not the one that was scanned.
    """
    with naming(path):
        data = os.pread(file.fileno(), length, offset)
    return json.loads(data)
