"""Sets on an fsspec URL (s3://, gs://, hf://, http:// ...): read through a cache on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.errors import AppError, DataError, UsageError
from common.files import sha256_file
from shards.files.sidecar import SidecarHeader
from shards.remote.cache import FileCache
from shards.remote.connection import RemoteFolder

logger = logging.getLogger(__name__)

CACHE_DIR_VARIABLE, CACHE_GB_VARIABLE = "SHARD_CACHE_DIR", "SHARD_CACHE_GB"
"""Environment variables, since a cache belongs to a machine and not to a configuration."""
DEFAULT_CACHE_GB = 200.0
_DOWNLOADS = 2
"""Files fetched side by side in the background."""


def default_cache_dir() -> Path:
    """Return $SHARD_CACHE_DIR, else $XDG_CACHE_HOME (or ~/.cache) / anytext2-distill / shards."""
    if CACHE_DIR_VARIABLE in os.environ:
        return Path(os.environ[CACHE_DIR_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anytext2-distill" / "shards"


def default_cache_bytes() -> int:
    """Return $SHARD_CACHE_GB, else 200, times 10**9; 0 for no limit.

    Raises:
        UsageError: the variable is not a number.
    """
    text = os.environ.get(CACHE_GB_VARIABLE, str(DEFAULT_CACHE_GB))
    try:
        return int(float(text) * 10**9)
    except (ValueError, OverflowError):
        raise UsageError(
            f"{CACHE_GB_VARIABLE} is {text!r}, expected a number of gigabytes, 0 for no limit"
        ) from None


class CachedStore:
    """A set under a URL; see `store.Store`."""

    def __init__(self, url: str, cache_dir: Path | None = None, cache_bytes: int | None = None) -> None:
        """Connect.

        Args:
            url: of the set's folder.
            cache_dir: on a local disk, one for all processes of a machine; `default_cache_dir()` if None.
            cache_bytes: limit of all cached shards, 0 for none; `default_cache_bytes()` if None. It should hold
                two windows of shards.
        """
        self._remote = RemoteFolder(url)
        self._cache_dir = cache_dir or default_cache_dir()
        self._cache_bytes = default_cache_bytes() if cache_bytes is None else cache_bytes
        self._cache = FileCache(self._cache_dir, self._cache_bytes)
        self._process = os.getpid()
        self._pool: ThreadPoolExecutor | None = None
        self._pending: dict[str, Future[Path]] = {}

    @property
    def location(self) -> str:
        """The URL."""
        return self._remote.url

    def sizes(self) -> dict[str, int]:
        """See `Store`."""

        def look(fs: Any) -> dict[str, int]:
            found = {}
            for prefix in ("", "plan/"):
                try:
                    entries = fs.ls(self._remote.path(prefix).rstrip("/"), detail=True)
                except FileNotFoundError:
                    continue
                for entry in entries:
                    if entry["type"] == "file":
                        size = entry["size"] if entry["size"] is not None else fs.size(entry["name"])
                        found[prefix + entry["name"].rstrip("/").rpartition("/")[2]] = int(size)
            return found

        return self._remote.attempt(look, "listing")

    def read(self, name: str, size: int = -1) -> bytes:
        """See `Store`."""
        end = size if size >= 0 else None

        def fetch(fs: Any) -> bytes:
            return bytes(fs.cat_file(self._remote.path(name), start=0 if end else None, end=end))

        return self._remote.attempt(fetch, f"reading {name}")

    def shard_path(self, header: SidecarHeader) -> Path:
        """See `Store`."""
        name = f"{header.sha256[:24]}-{header.shard}"  # another content is another file
        return self._cache.get(name, lambda path: self._download(header, path))

    def prefetch(self, headers: Sequence[SidecarHeader]) -> None:
        """See `Store`."""
        if self._pool is None or self._process != os.getpid():
            self._pool = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="prefetch")
            self._process, self._pending = os.getpid(), {}
        self._pending = {name: future for name, future in self._pending.items() if not future.done()}
        for header in headers:
            if header.shard not in self._pending:
                self._pending[header.shard] = self._pool.submit(self._prefetch_one, header)

    def _prefetch_one(self, header: SidecarHeader) -> Path:
        try:
            return self.shard_path(header)
        except (AppError, OSError) as error:
            logger.info(
                "prefetch of %s failed: %s", header.shard, error
            )  # whoever reads it tries again, and raises
            raise

    def _download(self, header: SidecarHeader, path: Path) -> None:
        def fetch(fs: Any) -> None:
            fs.get_file(self._remote.path(header.shard), str(path))
            size = path.stat().st_size
            if size != header.bytes:
                if size == fs.size(self._remote.path(header.shard)):
                    raise DataError(
                        f"{self.location}, {header.shard}: {size} bytes there, expected {header.bytes}; the shard "
                        "is damaged there: upload it again, or train with --exclude-damaged"
                    )
                raise ConnectionError(f"{size} of {header.bytes} bytes arrived")

        self._remote.attempt(fetch, f"downloading {header.shard}")
        if sha256_file(path) != header.sha256:
            raise DataError(
                f"{self.location}, {header.shard}: SHA-256 of the download is not the sidecar's; the shard is "
                "damaged there: upload it again, or train with --exclude-damaged"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.location, "cache_dir": self._cache_dir, "cache_bytes": self._cache_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
