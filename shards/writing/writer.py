"""Writing a shard so that its name either holds all of it, verified, or nothing.

Committed = the tar under a temporary name, fsynced, read back and compared, linked to its name, the folder
fsynced; then the sidecar in the same way, last. Only a sidecar whose size and hash match makes a shard complete.

Two tasks may make one shard. A lock lets one of them at a time give it its name, but nothing rests on locks, which
may not reach: a name is given by a link, which fails where another was first; who comes second drops its copy; and
who commits looks once more whether tar and sidecar are both its own. Where they are of different writers it begins
again, and so does whoever finds such a pair later.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import google_crc32c

from common.errors import DataError, MachineError, reason
from common.faults import blame
from common.files import (
    create_once,
    fsync_dir,
    link_new,
    open_temporary,
    read_bytes,
    sha256_file,
    temporary_path,
    write_bytes_atomic,
)
from shards.files.failures import Failure, encode_failures
from shards.files.locks import hold_lock
from shards.files.names import FAILURES_DIR, LOCK, failures_name, sample_key, shard_name, sidecar_name
from shards.files.sidecar import Entry, Member, SidecarHeader, check_table, decode_header, encode_sidecar
from shards.files.tasks import set_aside
from shards.records.codec import TENSORS, encode_record
from shards.records.ranges import Ranges, add_tensor

if TYPE_CHECKING:
    from shards.records.record import Record

logger = logging.getLogger(__name__)

_ATTEMPTS = 20
_PATIENCE_SECONDS = 2.0
"""Where locks do not keep writers apart: a tar without sidecar may be another's that is about to be complete."""


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
        self._last_index = -1
        self._inode = -1
        self.has_won = False
        """Whether `commit` gave this writer's files their names, and not another's stood there already."""
        self._sink = _Sink()
        self._tar: Any = None  # webdataset's TarWriter

    def __enter__(self) -> ShardWriter:
        from webdataset.writer import TarWriter  # brings torch, which looking at a set does without

        with _named(self._folder / self._name):
            self._temporary, self._sink.file = open_temporary(self._folder / self._name)
        # nothing about when and by whom: a shard's bytes depend on its records alone
        self._tar = TarWriter(self._sink, user="", group="", mode=0o644, mtime=0, encoder=False)
        return self

    def __exit__(self, *exception: object) -> None:
        file, self._sink.file = self._sink.file, None
        try:
            if file is not None:
                with _named(self._folder / self._name):
                    file.close()
        finally:
            self._temporary.unlink(missing_ok=True)

    @property
    def name(self) -> str:
        """The shard's file name."""
        return self._name

    @property
    def count(self) -> int:
        """Samples added so far."""
        return len(self._entries)

    @property
    def sha256(self) -> str:
        """Of what is in the file so far."""
        return self._sink.hash.hexdigest()

    def add(self, sample_index: int, record: Record) -> None:
        """Append a record.

        Args:
            sample_index: the input's index in the plan; rising within the shard.
            record: what to store.

        Raises:
            MachineError: the disk refused; nothing that was committed is touched.
        """
        self._take_index(sample_index)
        members = []
        key = sample_key(sample_index)
        with _named(self._folder / self._name):
            for name, data in encode_record(record).items():
                offset = self._tar.tarstream.offset + tarfile.BLOCKSIZE  # after the member's header
                self._tar.write({"__key__": key, name: data})  # one at a time: it would sort them by name
                members.append(
                    Member(name=name, offset=offset, length=len(data), crc32c=google_crc32c.value(data))
                )
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
            MachineError: the disk refused, or gave back other bytes than were written.
        """
        if self._sink.file is None:
            raise RuntimeError("commit() outside of the writer's context")
        with _named(self._folder / self._name):
            self._tar.close()
            self._sink.file.flush()
            os.fsync(self._sink.file.fileno())
            self._verify(self._sink.file)
            header = SidecarHeader(
                shard=self._name,
                identity_sha256=self._identity_sha256,
                count=len(self._entries),
                failed=len(self._failures),
                bytes=self._sink.size,
                sha256=self.sha256,
                ranges=self._ranges,
                provenance=self._provenance,
                table_crc32c="",
            )
            with hold_lock(
                self._folder / LOCK
            ) as locked:  # one writer at a time gives a shard its name, if it can be
                return self._publish(encode_sidecar(header, self._entries), alone=locked)

    def _publish(self, sidecar: bytes, *, alone: bool) -> SidecarHeader:
        """Give tar and sidecar their names, unless another writer's are there.

        Args:
            sidecar: its bytes.
            alone: a lock keeps other writers out.
        """
        path = self._folder / sidecar_name(self._name)
        failures_before: list[bytes | None] = []
        for attempt in range(_ATTEMPTS):
            existing = read_committed(self._folder, self._name, self._identity_sha256)
            if existing is not None:
                logger.info("%s: another task committed it first; this copy is dropped", self._name)
                for data in failures_before[:1]:
                    self._put_failures(data)
                return existing
            if attempt:
                time.sleep(random.uniform(0.0, 0.05 * attempt))  # two writers must not keep step
            _remove_unsound(path)
            if not self._take_name(wait=not alone and not attempt):
                continue
            failures_before.append(self._put_failures(encode_failures(self._failures) or None))
            if create_once(path, sidecar) and self._is_ours(path, sidecar):
                self.has_won = True
                return decode_header(sidecar, path.name)
        raise MachineError(
            f"{self._folder / self._name}: other tasks wrote the same shard {_ATTEMPTS} times meanwhile;"
            " run again: precompute writes it anew if what is there is not whole"
        )

    def _take_name(self, *, wait: bool) -> bool:
        """Put the tar in its place, over one that no sidecar makes complete.

        Args:
            wait: another writer may be about to write its sidecar: give it time.

        Returns:
            False if another writer was waited for and finished.
        """
        final, sidecar = self._folder / self._name, self._folder / sidecar_name(self._name)
        if not link_new(self._temporary, final):
            deadline = time.monotonic() + (_PATIENCE_SECONDS if wait else 0.0)
            while time.monotonic() < deadline:
                if sidecar.exists():
                    return False
                time.sleep(0.02)
            again = temporary_path(final)
            if link_new(self._temporary, again):
                again.replace(final)
                again.unlink(missing_ok=True)  # which stays if both were this file already
        self._inode = final.stat().st_ino
        fsync_dir(self._folder)
        return True

    def _is_ours(self, path: Path, sidecar: bytes) -> bool:
        """Tell whether tar, sidecar and failures under the shard's name are this writer's."""
        try:
            ours = (self._folder / self._name).stat().st_ino == self._inode and read_bytes(path) == sidecar
        except FileNotFoundError:
            return False
        if ours:
            self._put_failures(encode_failures(self._failures) or None)
        return ours

    def _put_failures(self, data: bytes | None) -> bytes | None:
        """Put a list of failures in its place, or away; return what was there before."""
        path = self._folder / failures_name(self._name)
        before = read_bytes(path) if path.exists() else None
        if data is not None and data != before:
            (self._folder / FAILURES_DIR).mkdir(exist_ok=True)
            write_bytes_atomic(path, data)
        elif data is None and before is not None:
            path.unlink(missing_ok=True)
        return before

    def _take_index(self, sample_index: int) -> None:
        if sample_index <= self._last_index:
            raise ValueError(f"sample index {sample_index} after {self._last_index}: expected rising indices")
        self._last_index = sample_index

    def _verify(self, file: IO[bytes]) -> None:
        """Read the file back, from the disk as far as the kernel can be asked to, and compare."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with self._temporary.open("rb") as again:
            received = hashlib.file_digest(again, "sha256")
            if received.hexdigest() != self.sha256:
                raise MachineError(
                    f"{self._folder / self._name}: read back other bytes than were written; "
                    "check the disk or its network, then run again: nothing was committed"
                )
            again.seek(0)
            with tarfile.open(fileobj=again, mode="r:") as tar:
                found = [(member.name, member.offset_data, member.size) for member in tar]
        if found != [(f"{e.key}.{m.name}", m.offset, m.length) for e in self._entries for m in e.members]:
            raise DataError(
                f"{self._folder / self._name}: the tar's headers put its members elsewhere than its table would; "
                "nothing was committed: install another version of webdataset, then run again"
            )


class _Sink:
    """What webdataset writes to: a file, hashed on the way. Without one it takes the rest of a shard given up."""

    def __init__(self) -> None:
        self.file: IO[bytes] | None = None
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        if self.file is not None:
            self.file.write(data)
            self.hash.update(data)
            self.size += len(data)


def read_committed(folder: Path, name: str, identity_sha256: str) -> SidecarHeader | None:
    """Tell whether a shard is committed: a sound sidecar of this set whose size and hash match the shard.

    Args:
        folder: the set's.
        name: the shard's file name.
        identity_sha256: the manifest's.

    Returns:
        The sidecar's header, None if the shard must be (re)written.

    Raises:
        OSError: the disk failed; nothing is known about the shard.
    """
    try:
        data = read_bytes(folder / sidecar_name(name))
        size = (folder / name).stat().st_size
    except FileNotFoundError:
        return None
    try:
        header = decode_header(data, sidecar_name(name))
        check_table(data, header, sidecar_name(name))
    except DataError as error:
        logger.warning("%s: will be written again: %s", name, error)
        return None
    if (header.shard, header.identity_sha256) != (name, identity_sha256):
        logger.warning(
            "%s: its sidecar belongs to %s of another set; it will be written again", name, header.shard
        )
        return None
    if size != header.bytes or sha256_file(folder / name) != header.sha256:
        logger.warning("%s: size or hash is not the sidecar's; it will be written again", name)
        return None
    return header


def _remove_unsound(sidecar: Path) -> None:
    """Remove the sidecar of a shard that is damaged: it must not be seen beside the new tar."""
    with suppress(FileNotFoundError):
        data = read_bytes(sidecar)
        set_aside(sidecar, data)
        fsync_dir(sidecar.parent)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn an error of the disk into one line that says which shard and what is safe."""
    try:
        yield
    except OSError as error:
        raise blame(error)(
            f"{path}: cannot be written ({reason(error)}); committed shards are safe: free space or mend the disk,"
            " then run again"
        ) from error
