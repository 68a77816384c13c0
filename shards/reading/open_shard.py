"""One shard of a set: its table, and its members' bytes, which are checked before they are handed out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import google_crc32c

from common.errors import DataError, reason
from common.faults import raise_disk_fault
from shards.files.names import sidecar_name
from shards.files.sidecar import Entry, Member, SidecarHeader, decode_header, decode_table
from shards.reading.store import Store
from shards.records.members import PREDICTIONS

_REMEDY = (
    "the shard is damaged or renamed: `verify` lists all damage, precompute writes it anew, "
    "--exclude-damaged goes without"
)

T = TypeVar("T")


class OpenShard:
    """One shard, open for reading."""

    def __init__(self, store: Store, header: SidecarHeader, entries: Sequence[Entry]) -> None:
        """Open its file; `entries` are the samples that can be read."""
        self.header, self.entries = header, entries
        where = f"{header.shard} in {store.location}"
        path = _guard(lambda: store.shard_path(header), where)
        self._file = _guard(lambda: path.open("rb", buffering=0), where)

    def read(self, entry: Entry, members: Sequence[str]) -> dict[str, bytes]:
        """Read and check members; `x0.safetensors` is left out if the shard has none."""
        present = {member.name: member for member in entry.members}
        found = {}
        for name in members:
            if name in present:
                found[name] = self._read(entry, present[name])
            elif name != PREDICTIONS:
                raise DataError(f"{self.header.shard}, sample {entry.key}: it has no member {name!r}")
        return found

    def _read(self, entry: Entry, member: Member) -> bytes:
        where = f"{self.header.shard}, sample {entry.key}, {member.name}"
        data = _guard(lambda: os.pread(self._file.fileno(), member.length, member.offset), where)
        if len(data) != member.length:
            raise DataError(f"{where}: the file ends {member.length - len(data)} bytes early; {_REMEDY}")
        crc = google_crc32c.value(data)
        if crc != member.crc32c:
            raise DataError(f"{where}: crc32c is {crc:08x}, expected {member.crc32c:08x}; {_REMEDY}")
        return data


def read_table(store: Store, header: SidecarHeader) -> list[Entry]:
    """Read a shard's table of samples; see `ShardSet.table`."""
    name = sidecar_name(header.shard)
    where = f"{name} in {store.location}"
    data = _guard(lambda: store.read(name), where)
    if decode_header(data, where) != header:
        raise DataError(f"{where}: the sidecar changed since the set was opened; was the shard rewritten?")
    return decode_table(data, header, where)


def _guard(action: Callable[[], T], where: str) -> T:
    """Turn an error of the disk into one line that says what was read."""
    try:
        return action()
    except FileNotFoundError:
        raise DataError(f"{where}: the file is missing; {_REMEDY}") from None
    except OSError as error:
        raise_disk_fault(error, where)
        raise DataError(f"{where}: cannot be read ({reason(error)}); {_REMEDY}") from error
