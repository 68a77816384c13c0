"""A file system that fails on demand: the Nth operation below a folder raises, once or from then on for good."""

from __future__ import annotations

import builtins
import fcntl
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OS_FUNCTIONS = (
    *("open", "close", "fsync", "fstat", "replace", "rename", "link", "unlink", "stat", "mkdir"),
    *("scandir", "listdir", "pread", "preadv", "posix_fadvise"),
)


class FaultyFiles:
    """Counts operations while armed; the real system calls are made unless the fault says otherwise."""

    def __init__(self, fail_at: int, errno: int, *, for_good: bool) -> None:
        self.count, self.fail_at, self.errno, self.for_good = 0, fail_at, errno, for_good

    def tick(self, what: str) -> None:
        """Count an operation, and fail if its turn has come."""
        self.count += 1
        if self.count == self.fail_at or (self.for_good and self.count > self.fail_at):
            raise OSError(self.errno, os.strerror(self.errno), f"injected into operation {self.count}, {what}")

    @property
    def reached(self) -> bool:
        """Whether a fault was injected."""
        return self.count >= self.fail_at

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Replace `os`'s functions and `open`."""
        saved = {name: getattr(os, name) for name in _OS_FUNCTIONS}
        real_open, real_flock = io.open, fcntl.flock
        try:
            for name, function in saved.items():
                setattr(os, name, self._wrap(name, function))
            fcntl.flock = self._wrap("flock", real_flock)  # type: ignore[assignment]
            io.open = builtins.open = self._open  # type: ignore[assignment]
            yield
        finally:
            for name, function in saved.items():
                setattr(os, name, function)
            fcntl.flock = real_flock
            io.open = builtins.open = real_open

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "close":  # Linux frees the descriptor even if close fails
                function(*args, **kwargs)
                return self.tick(name)
            self.tick(name)
            return function(*args, **kwargs)

        return call

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(file, str | Path) and "b" in mode, "the package opens files by path, as bytes"
        self.tick(f"open {file}")
        raw = _FaultyRaw(str(file), mode.replace("b", ""), self)
        if buffering == 0:
            return raw
        if "+" in mode:
            return io.BufferedRandom(raw)
        return io.BufferedReader(raw) if mode == "rb" else io.BufferedWriter(raw)


class _FaultyRaw(io.FileIO):
    def __init__(self, path: str, mode: str, faults: FaultyFiles) -> None:
        self._faults = faults
        super().__init__(path, mode)

    def write(self, data: Any) -> int:
        try:
            self._faults.tick("write")
        except OSError:
            super().write(bytes(data)[: len(data) // 2])  # a full disk takes what still fits
            raise
        return super().write(data)

    def readinto(self, buffer: Any) -> int:
        self._faults.tick("read")
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._faults.tick("read")
        return super().readall()

    def close(self) -> None:
        was_closed = self.closed
        super().close()
        if not was_closed:
            self._faults.tick("close")
