"""Shards as they were before webdataset's TarWriter wrote them: two empty blocks end the tar, and no more."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from shards.files.names import sidecar_name
from shards.files.sidecar import decode_header, decode_table, encode_sidecar


def make_old(folder: Path, shard: str) -> None:
    """Give a committed shard and its sidecar the bytes that they would have had."""
    sidecar = folder / sidecar_name(shard)
    header = decode_header(sidecar.read_bytes(), shard)
    entries = decode_table(sidecar.read_bytes(), header, shard)
    data, old = (folder / shard).read_bytes(), b""
    for entry in entries:
        for member in entry.members:
            old += _header_block(f"{entry.key}.{member.name}", member.length)
            assert member.offset == len(old)
            old += data[member.offset : member.offset + member.length] + bytes(-member.length % 512)
    old += bytes(1024)
    header = dataclasses.replace(header, bytes=len(old), sha256=hashlib.sha256(old).hexdigest())
    (folder / shard).write_bytes(old)
    sidecar.write_bytes(encode_sidecar(header, entries))


def _header_block(name: str, size: int) -> bytes:
    """Spell out a ustar header: mode 0644, owner 0 without a name, time 0."""
    numbers = b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"00000000000\0"
    start, end = name.encode().ljust(100, b"\0") + numbers, b"0".ljust(101, b"\0") + b"ustar\x0000"
    end = end.ljust(512 - len(start) - 8, b"\0")
    checksum = sum(start) + sum(end) + 8 * ord(" ")
    return start + b"%06o\0 " % checksum + end
