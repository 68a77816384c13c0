"""Writing a shard so that its name either holds all of it, verified, or nothing.

Committed = the tar under a temporary name, fsynced, read back and compared, renamed, the folder fsynced; then the
sidecar in the same way, last. Nothing but a sidecar whose size and hash match says that a shard is complete.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import google_crc32c

from common.errors import DataError, reason
from common.files import claim, fsync_dir, sha256_file, temporary_path, write_bytes_atomic
from shards.files.failures import Failure, encode_failures
from shards.files.locks import commit_lock
from shards.files.names import FAILURES_DIR, failures_name, sample_key, shard_name, sidecar_name
from shards.files.sidecar import Entry, Member, SidecarHeader, decode_header, decode_table, encode_sidecar
from shards.files.tar import END, header_block, padding
from shards.records.codec import TENSORS, encode_record
from shards.records.ranges import Ranges, add_tensor

if TYPE_CHECKING:
    from shards.records.record import Record

logger = logging.getLogger(__name__)

_CHUNK = 1 << 22


class ShardWriter:
    """Writes one shard; a context manager that leaves nothing behind unless `commit` was called.

    Example:
        with ShardWriter(folder, 12, identity_sha256=manifest.identity_sha256, provenance=versions) as writer:
            writer.add(3072, record)
            header = writer.commit()
    """

    def __init__(
        self, folder: Path, shard_index: int, *, identity_sha256: str, provenance: Mapping[str, Any]
    ) -> None:
        """Name a shard; its file is made on entering the context.

        Args:
            folder: the set's, with its manifest in place.
            shard_index: 0 or more.
            identity_sha256: the manifest's.
            provenance: device and library versions, JSON values; stored, not compared. Bytes of the sidecar depend
                on it, so it should hold nothing that changes from run to run.
        """
        self._folder, self._name = folder, shard_name(shard_index)
        self._identity_sha256, self._provenance = identity_sha256, dict(provenance)
        self._entries: list[Entry] = []
        self._failures: list[Failure] = []
        self._ranges: Ranges = {}
        self._hash = hashlib.sha256()
        self._position = 0
        self._last_index = -1
        self._file: BinaryIO | None = None
        self._temporary = temporary_path(folder / self._name)

    def __enter__(self) -> ShardWriter:
        with _named(self._folder / self._name):
            file = self._temporary.open("xb")
            claim(file.fileno())
            self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        finally:
            self._temporary.unlink(missing_ok=True)

    @property
    def count(self) -> int:
        """Samples added so far."""
        return len(self._entries)

    @property
    def sha256(self) -> str:
        """Of the bytes written so far."""
        return self._hash.hexdigest()

    def add(self, sample_index: int, record: Record) -> None:
        """Append a record.

        Args:
            sample_index: the input's index in the plan; rising within the shard.
            record: what to store.

        Raises:
            DataError: the disk refused; nothing that was committed is touched.
        """
        self._take_index(sample_index)
        members = []
        key = sample_key(sample_index)
        with _named(self._folder / self._name):
            for name, data in encode_record(record).items():
                self._write(header_block(f"{key}.{name}", len(data)))
                members.append(
                    Member(name=name, offset=self._position, length=len(data), crc32c=google_crc32c.value(data))
                )
                self._write(data)
                self._write(padding(len(data)))
        for tensors in TENSORS.values():
            for name in tensors:
                value = getattr(record, name)
                if value is not None:
                    add_tensor(self._ranges, name, value)
        self._entries.append(Entry(key=key, members=tuple(members)))

    def fail(self, failure: Failure) -> None:
        """Note an input that became no record."""
        self._take_index(failure.sample_index)
        self._failures.append(failure)

    def commit(self) -> SidecarHeader:
        """Make the shard durable and visible.

        If another task committed the same shard meanwhile, its files stay and are returned.

        Raises:
            DataError: the disk refused, or gave back other bytes than were written.
        """
        if self._file is None:
            raise RuntimeError("commit() outside of the writer's context")
        with _named(self._folder / self._name):
            self._write(END)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._verify(self._file)
            header = SidecarHeader(
                shard=self._name,
                identity_sha256=self._identity_sha256,
                count=len(self._entries),
                failed=len(self._failures),
                bytes=self._position,
                sha256=self._hash.hexdigest(),
                ranges=self._ranges,
                provenance=self._provenance,
                table_crc32c="",
            )
            with commit_lock(self._folder):
                existing = read_committed(self._folder, self._name, self._identity_sha256)
                if existing is not None:
                    logger.info("%s: another task committed it first; this copy is dropped", self._name)
                    return existing
                return self._publish(header)

    def _publish(self, header: SidecarHeader) -> SidecarHeader:
        sidecar = self._folder / sidecar_name(self._name)
        if sidecar.exists():  # of a shard that is damaged: it must not be seen beside the new tar
            sidecar.unlink()
            fsync_dir(self._folder)
        self._write_failures()
        self._temporary.replace(self._folder / self._name)
        fsync_dir(self._folder)
        data = encode_sidecar(header, self._entries)
        write_bytes_atomic(sidecar, data)
        return decode_header(data, sidecar.name)

    def _write_failures(self) -> None:
        path = self._folder / failures_name(self._name)
        if self._failures:
            (self._folder / FAILURES_DIR).mkdir(exist_ok=True)
            write_bytes_atomic(path, encode_failures(self._failures))
        elif path.exists():
            path.unlink()

    def _take_index(self, sample_index: int) -> None:
        if sample_index <= self._last_index:
            raise ValueError(f"sample index {sample_index} after {self._last_index}: expected rising indices")
        self._last_index = sample_index

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)
        self._position += len(data)

    def _verify(self, file: BinaryIO) -> None:
        """Read the file back, from the disk as far as the kernel can be asked to, and compare."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        received = hashlib.sha256()
        with self._temporary.open("rb") as again:
            while chunk := again.read(_CHUNK):
                received.update(chunk)
        if received.digest() != self._hash.digest():
            raise DataError(
                f"{self._folder / self._name}: read back other bytes than were written; "
                "check the disk or its network, then run again: nothing was committed"
            )


def read_committed(folder: Path, name: str, identity_sha256: str, *, quick: bool = False) -> SidecarHeader | None:
    """Tell whether a shard is committed: a sound sidecar of this set whose size and hash match the shard.

    Args:
        folder: the set's.
        name: the shard's file name.
        identity_sha256: the manifest's.
        quick: trust the size, do not hash the shard.

    Returns:
        The sidecar's header, None if the shard must be (re)written.

    Raises:
        OSError: the disk failed; nothing is known about the shard.
    """
    try:
        data = (folder / sidecar_name(name)).read_bytes()
        size = (folder / name).stat().st_size
    except FileNotFoundError:
        return None
    try:
        header = decode_header(data, sidecar_name(name))
        decode_table(data, header, sidecar_name(name))
    except DataError as error:
        logger.warning("%s: will be written again: %s", name, error)
        return None
    if (header.shard, header.identity_sha256) != (name, identity_sha256):
        logger.warning(
            "%s: its sidecar belongs to %s of another set; it will be written again", name, header.shard
        )
        return None
    if size != header.bytes or (not quick and sha256_file(folder / name) != header.sha256):
        logger.warning("%s: size or hash is not the sidecar's; it will be written again", name)
        return None
    return header


def is_committed(folder: Path, shard_index: int, identity_sha256: str, *, quick: bool = False) -> bool:
    """Tell whether a shard need not be written; see `read_committed`."""
    return read_committed(folder, shard_name(shard_index), identity_sha256, quick=quick) is not None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn an error of the disk into one line that says which shard and what is safe."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({reason(error)}); committed shards are safe: free space or mend the disk,"
            " then run again"
        ) from error
