"""Whole files kept on this machine: made once for all processes, complete or absent, the oldest go first."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from common.files import TEMPORARY_SUFFIX, temporary_file
from shards.files.locks import hold_lock, remove_leftovers

logger = logging.getLogger(__name__)


class FileCache:
    """A folder of files with a size limit, shared by all processes of a machine."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Open or make it.

        Args:
            folder: on a local disk.
            max_bytes: files above this total are evicted, least recently asked for first; 0 for no limit. A file
                in use can be evicted: whoever has it open keeps its bytes.
        """
        self._folder, self._max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the path of a file, made by the first process that asks; others wait for it.

        Args:
            name: a file name; equal names must mean equal content.
            make: writes the file to the temporary path it is given, or raises.
        """
        path = self._folder / name
        if self._touch(path):
            return path
        with hold_lock(self._folder / f".{name}.lock"):
            if self._touch(path):  # made while this process waited
                return path
            with temporary_file(path) as (temporary, _file):
                make(temporary)
                temporary.replace(path)
        self._evict(keep=path)
        return path

    def _touch(self, path: Path) -> bool:
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _evict(self, keep: Path) -> None:
        if not self._max_bytes:
            return
        with hold_lock(self._folder / ".evict.lock"):
            remove_leftovers(self._folder, local=True)
            files = []
            for path in self._folder.iterdir():
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                if not path.name.startswith(".") and not path.name.endswith(TEMPORARY_SUFFIX):
                    files.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _time, size, _path in files)
            for _time, size, path in sorted(files):
                if total <= self._max_bytes:
                    break
                if path != keep:
                    path.unlink(missing_ok=True)
                    total -= size
                    logger.debug("cache: evicted %s", path.name)
