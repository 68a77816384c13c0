"""Where a set's files are read from: a folder, or a URL through a cache on this machine (`remote`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from common.faults import naming
from shards.files.sidecar import SidecarHeader


class Store(Protocol):
    """Read access to a set's files; names are relative to the set, e.g. "plan/000000.txt"."""

    @property
    def location(self) -> str:
        """The folder or URL, for errors and for the frozen set."""

    def sizes(self) -> dict[str, int]:
        """Name to size in bytes of every file at the set's top level and in its plan."""

    def read(self, name: str, size: int = -1) -> bytes:
        """Read a small file, or its first `size` bytes.

        Raises:
            FileNotFoundError: there is none.
        """

    def shard_path(self, header: SidecarHeader) -> Path:
        """Return a path on this machine that holds a whole shard; a remote one is downloaded first.

        Raises:
            FileNotFoundError: there is none.
            MachineError: a download failed.
            DataError: it brought other bytes than the sidecar says.
        """

    def prefetch(self, headers: Sequence[SidecarHeader]) -> None:
        """Start to bring shards here in the background; errors show when they are read."""


class FolderStore:
    """A set in a folder of a mounted file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    @property
    def location(self) -> str:
        """The folder's absolute path."""
        return str(self.folder)

    def sizes(self) -> dict[str, int]:
        """See `Store`."""
        found = {}
        for prefix in ("", "plan/"):
            try:
                with os.scandir(self.folder / prefix) as entries:
                    found.update({prefix + e.name: e.stat().st_size for e in entries if e.is_file()})
            except FileNotFoundError:
                continue
        return found

    def read(self, name: str, size: int = -1) -> bytes:
        """See `Store`."""
        path = self.folder / name
        with naming(path), path.open("rb", buffering=0) as file:
            if size >= 0:
                return file.read(size) or b""
            return file.readall()

    def shard_path(self, header: SidecarHeader) -> Path:
        """See `Store`."""
        path = self.folder / header.shard
        if not path.exists():
            raise FileNotFoundError(path)
        return path

    def prefetch(self, headers: Sequence[SidecarHeader]) -> None:
        """Nothing to do: the files are here."""


def open_store(location: str | Path) -> Store:
    """Return the store of a folder or URL."""
    if "://" in str(location):
        from shards.remote.cached_store import CachedStore

        return CachedStore(str(location))
    return FolderStore(Path(location))
