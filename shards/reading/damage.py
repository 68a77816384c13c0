"""Find every damage in a set, by name, in one pass over its bytes."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from common.errors import DataError, reason
from common.faults import raise_disk_fault
from shards.files.sidecar import Entry, Member, SidecarHeader
from shards.records.codec import TENSORS, decode_arrays
from shards.records.tensor_file import is_finite

_CHUNK = 1 << 20
_REMEDY = "run precompute again to write the shard anew, or train with --exclude-damaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that is wrong."""

    shard: str
    """File name of the shard, or of whatever file is damaged."""
    sample: str | None
    """Key of the sample that is lost; None if none is, or if all of the shard's are (`whole`)."""
    whole: bool
    """No sample of the shard can be used."""
    message: str
    """One line."""
    unread: bool = False
    """Nothing is known of it: the disk or the connection failed."""


def whole_shard(shard: str, message: str) -> Damage:
    """Say that no sample of a shard can be used, and what to do about it."""
    return Damage(shard=shard, sample=None, whole=True, message=f"{shard}: {message}; {_REMEDY}")


def verify_shard(path: Path, header: SidecarHeader, entries: Sequence[Entry]) -> list[Damage]:
    """Compare a shard with its sidecar: SHA-256 of the file and crc32c of every member, in one pass.

    Tensors that were written as they are and could not be trained on, for a NaN in them, are damage too.

    If they differ, a second pass also compares every tar header and padding, to name what is damaged.

    Returns:
        Nothing, or every damage found, by sample and member.
    """
    shard = header.shard
    try:
        with path.open("rb", buffering=0) as file:
            descriptor = file.fileno()
            size = os.fstat(descriptor).st_size
            if size == 0:
                return [whole_shard(shard, f"the file is empty, expected {header.bytes} bytes")]
            sha256, found = _scan(descriptor, size, shard, entries)
            if sha256 != header.sha256 or found:
                found += _find_unread_damage(descriptor, size, header, entries)
    except FileNotFoundError:
        return [whole_shard(shard, "the file is missing")]
    except OSError as error:
        raise_disk_fault(error, path)
        return [whole_shard(shard, f"cannot be read ({reason(error)})")]
    if size != header.bytes:
        found.insert(0, _damage(shard, None, f"{size} bytes, expected {header.bytes}"))
    if sha256 != header.sha256 and not found:
        found.append(_damage(shard, None, "SHA-256 differs from the sidecar's, though every part of it is sound"))
    return found


def _scan(descriptor: int, size: int, shard: str, entries: Sequence[Entry]) -> tuple[str, list[Damage]]:
    digest = hashlib.sha256()
    found = []
    start = 0
    for entry in entries:
        end = max(member.offset + member.length for member in entry.members)
        block = os.pread(descriptor, end - start, start)
        digest.update(block)
        for member in entry.members:
            content = block[member.offset - start : member.offset - start + member.length]
            if len(content) < member.length:
                found.append(
                    _lost(shard, entry, member, f"the file ends {member.length - len(content)} bytes early")
                )
            elif (crc := google_crc32c.value(content)) != member.crc32c:
                found.append(_lost(shard, entry, member, f"crc32c is {crc:08x}, expected {member.crc32c:08x}"))
            elif problem := _unusable(member.name, content):
                found.append(_lost(shard, entry, member, problem))
        start = end
    while start < size and (block := os.pread(descriptor, _CHUNK, start)):
        digest.update(block)
        start += len(block)
    return digest.hexdigest(), found


def _unusable(member: str, content: bytes) -> str:
    """Say why training could not use a member whose bytes are as they were written, or return ""."""
    if member not in TENSORS:
        return ""
    try:
        arrays = decode_arrays({member: content}, "it")
    except DataError as error:
        return str(error)
    bad = [name for name, array in arrays.items() if array.dtype == np.float16 and not is_finite(array)]
    return f"{' and '.join(bad)} holds NaN or infinity" if bad else ""


def _find_unread_damage(
    descriptor: int, size: int, header: SidecarHeader, entries: Sequence[Entry]
) -> Iterator[Damage]:
    """Compare what no record depends on: tar headers, padding, the end. Other tools read these."""
    shard, position = header.shard, 0
    for entry in entries:
        for member in entry.members:
            where = f"sample {entry.key}, {member.name}"
            head = _tar_header(f"{entry.key}.{member.name}", member.length)
            if os.pread(descriptor, len(head), position) != head:
                yield _damage(shard, None, f"{where}: its tar header is damaged (training does not read it)")
            position = member.offset + member.length
            fill = -position % tarfile.BLOCKSIZE
            if os.pread(descriptor, fill, position) != bytes(fill):
                yield _damage(shard, None, f"{where}: the padding after it is damaged (training does not read it)")
            position += fill
    end = max(header.bytes - position, 2 * tarfile.BLOCKSIZE)  # two empty blocks, or more of them
    if os.pread(descriptor, max(size - position, end), position) != bytes(end):
        yield _damage(shard, None, "the end of the archive is damaged (training does not read it)")


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # time 0, owner 0 without a name, mode 0644, as the writer's
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _lost(shard: str, entry: Entry, member: Member, what: str) -> Damage:
    return _damage(shard, entry.key, f"sample {entry.key}, {member.name}: {what}")


def _damage(shard: str, sample: str | None, message: str) -> Damage:
    return Damage(shard=shard, sample=sample, whole=False, message=f"{shard}: {message}")
