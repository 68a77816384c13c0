"""The sidecar of a shard: what makes it committed, and where everything in it lies.

A sidecar is one JSON object, laid out in lines so that a set of a million samples opens fast: the first line is
a header with counts and hashes, then one line a sample. Opening a set reads headers; a shard's table is parsed
when its first sample is read. Header and table each have a crc32c, so that no damage to a sidecar can pass for
its content.

    {"crc32c":"<of the rest of this line>","bytes":...,"count":...,"sha256":...,...,"table_crc32c":"...",
    "samples":[
    ["000000123",[["json",512,300,2868..],["conditioning.safetensors",1536,...]]],
    ...
    ]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c

from common.errors import DataError
from common.files import canonical_json
from shards.files.names import SCHEMA
from shards.records.members import MEMBERS

HEADER_READ_BYTES = 8192
"""A header is shorter than this unless its provenance is unusually long."""

_TABLE_START = b'"samples":[\n'
_TABLE_END = b"]}\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Where one member of a sample lies."""

    name: str
    """E.g. "rollout.safetensors"."""
    offset: int
    """Of its first byte in the shard."""
    length: int
    """In bytes."""
    crc32c: int
    """Of its bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One sample of a shard."""

    key: str
    """Nine digits: the input's index in the set's plan."""
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarHeader:
    """A shard as a whole."""

    shard: str
    """File name of the shard."""
    identity_sha256: str
    """Of the manifest under which it was written."""
    count: int
    """Samples in it."""
    failed: int
    """Inputs of it that failed."""
    bytes: int
    """Size of the shard."""
    sha256: str
    """Of the shard."""
    ranges: dict[str, list[float]]
    """Of each float tensor: [least, greatest, sum of squares, values]."""
    provenance: dict[str, Any]
    """Device and library versions; not compared."""
    table_crc32c: str
    """Of the table's bytes."""


def encode_sidecar(header: SidecarHeader, entries: Sequence[Entry]) -> bytes:
    """Serialise a sidecar; the header's `table_crc32c` is filled in here."""
    table = encode_table(entries)
    fields = {name: getattr(header, name) for name in _HEADER_FIELDS}
    fields["table_crc32c"] = f"{google_crc32c.value(table):08x}"
    body = canonical_json({"schema": SCHEMA, **fields})[1:-2] + b","
    return b'{"crc32c":"%08x",' % google_crc32c.value(body) + body + b"\n" + table


def encode_table(entries: Sequence[Entry]) -> bytes:
    """Serialise the part after the header's line."""
    rows = [
        canonical_json([entry.key, [[m.name, m.offset, m.length, m.crc32c] for m in entry.members]])[:-1]
        for entry in entries
    ]
    return _TABLE_START + b",\n".join(rows) + b"\n" + _TABLE_END


def decode_header(data: bytes, where: str) -> SidecarHeader:
    """Parse the header from a sidecar's first bytes.

    Args:
        data: the sidecar, or at least its first line.
        where: its name, for errors.

    Raises:
        DataError: empty, cut off, damaged, or of another schema.
    """
    line, newline, _rest = data.partition(b"\n")
    prefix, body = line[:21], line[21:]  # {"crc32c":"xxxxxxxx",
    if not newline or prefix != b'{"crc32c":"%08x",' % google_crc32c.value(body):
        raise DataError(
            f"{where}: the sidecar is {'damaged' if data else 'empty'} (its header does not match its checksum); "
            "if the shard is whole, run precompute again to write both anew"
        )
    values = json.loads(b"{" + body[:-1] + b"}")
    if values.pop("schema", None) != SCHEMA or values.keys() != _HEADER_FIELDS:
        raise DataError(f"{where}: written by another version of the shard format than {SCHEMA}")
    return SidecarHeader(**values)


def check_table(data: bytes, header: SidecarHeader, where: str) -> bytes:
    """Return a whole sidecar's table, unparsed.

    Raises:
        DataError: it does not match the header's checksum.
    """
    table = data.partition(b"\n")[2]
    if f"{google_crc32c.value(table):08x}" != header.table_crc32c:
        raise DataError(f"{where}: the sidecar's table of samples does not match its checksum: it is damaged")
    return table


def decode_table(data: bytes, header: SidecarHeader, where: str) -> list[Entry]:
    """Parse the table from a whole sidecar.

    Raises:
        DataError: the table does not match the header's checksum, count or size.
    """
    table = check_table(data, header, where)
    entries = [
        Entry(key=key, members=tuple(Member(name=n, offset=o, length=z, crc32c=c) for n, o, z, c in members))
        for key, members in json.loads(b"{" + table)["samples"]
    ]
    ok = all(
        member.name in MEMBERS and member.offset + member.length <= header.bytes
        for entry in entries
        for member in entry.members
    )
    if len(entries) != header.count or not ok:
        raise DataError(
            f"{where}: the sidecar's table does not fit its header; it was not written by this project"
        )
    return entries


_HEADER_FIELDS = set(SidecarHeader.__dataclass_fields__)
