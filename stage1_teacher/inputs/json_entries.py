"""The entries of a large JSON file, found in one pass and read one at a time afterwards.

AnyWord's files hold millions of entries and gigabytes; parsed whole they take ten times that in memory. Kept here
are 16 bytes an entry: its number, where it begins, how long it is.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import Any

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


class JsonEntries:
    """The members of a list inside a JSON object, read from disk one at a time; safe to use from threads."""

    def __init__(
        self,
        path: Path,
        *,
        list_field: str,
        other_fields: Collection[str],
        ignored: Collection[str] = (),
        keep: Callable[[int, Any], bool],
    ) -> None:
        """Scan the file.

        Args:
            path: a JSON file that holds one object.
            list_field: the object's field that holds the list.
            other_fields: what else the object may hold; see `header`.
            ignored: further fields that may stand there unread.
            keep: called with (number in the list, parsed entry); False leaves the entry out.

        Raises:
            DataError: no such file, not such JSON, an unknown field, or whatever `keep` raises.
        """
        self.path = path
        self.header: dict[str, Any] = {}
        self._offsets, self._lengths, self._numbers = array("Q"), array("I"), array("I")
        self._list_field, self._keep = list_field, keep
        self._allowed = {list_field, *other_fields, *ignored}
        try:
            scanner = _Scanner(path)
            self._file = path.open("rb")
        except OSError as error:
            raise_disk_fault(error, path)
            raise DataError(f"{path}: {reason(error)}") from None
        with naming(path), closing(scanner):
            self._scan_object(scanner)
        for field in (list_field, *other_fields):
            if field not in self.header:
                raise DataError(f"{path}: field {field!r} is missing")

    def _scan_object(self, scanner: _Scanner) -> None:
        scanner.take("{")
        while True:
            field = scanner.value()[0]
            if not isinstance(field, str):
                raise scanner.fail(f"found {field!r:.40}, expected a field's name")
            if field not in self._allowed:
                raise DataError(f"{self.path}: unknown field {field!r}; {nearest(field, self._allowed)}")
            scanner.take(":")
            if field == self._list_field:
                self._scan_list(scanner)
                self.header[field] = None
            else:
                self.header[field] = scanner.value()[0]
            if scanner.take(",}") == "}":
                break
        if scanner.peek():
            raise scanner.fail("something follows the object")

    def _scan_list(self, scanner: _Scanner) -> None:
        scanner.take("[")
        if scanner.peek() == "]":
            scanner.take("]")
            return
        number = 0
        while True:
            entry, offset, length = scanner.value()
            if self._keep(number, entry):
                self._offsets.append(offset)
                self._lengths.append(length)
                self._numbers.append(number)
            number += 1
            if scanner.take(",]") == "]":
                return

    def __len__(self) -> int:
        return len(self._offsets)

    def number(self, index: int) -> int:
        """Return the place of the index-th kept entry in the file's list."""
        return self._numbers[index]

    def __getitem__(self, index: int) -> Any:
        """Read the index-th kept entry.

        Raises:
            DataError: the file changed since it was scanned.
        """
        with naming(self.path):
            data = os.pread(self._file.fileno(), self._lengths[index], self._offsets[index])
        try:
            return json.loads(data)
        except ValueError:
            raise DataError(f"{self.path}: the file changed while it was in use") from None
