"""Where a set's files are read from: a folder, or a URL through a cache on this machine (`remote`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


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

    def local_path(self, name: str) -> Path:
        """Return a path on this machine that holds the whole file; a remote one is downloaded first.

        Raises:
            FileNotFoundError: there is none.
        """

    def prefetch(self, names: Sequence[str]) -> None:
        """Start to bring files here in the background; needs no answer."""


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
        with (self.folder / name).open("rb", buffering=0) as file:
            if size >= 0:
                return file.read(size) or b""
            return file.readall()

    def local_path(self, name: str) -> Path:
        """See `Store`."""
        path = self.folder / name
        if not path.exists():
            raise FileNotFoundError(path)
        return path

    def prefetch(self, names: Sequence[str]) -> None:
        """Nothing to do: the files are here."""
