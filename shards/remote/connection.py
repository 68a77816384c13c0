"""Files under an fsspec URL (s3://, gs:// ...): one connection a process, and tries again when it breaks."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from common.errors import AppError, MachineError, UsageError
from common.faults import blame

logger = logging.getLogger(__name__)

_TRIES = 5
_FIRST_WAIT_SECONDS = 0.2
"""Before the second try; it doubles with every try."""

_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""Not the connection's: trying again at once does not help."""

T = TypeVar("T")


class RemoteFolder:
    """Files under a URL; usable after a fork, which fsspec's own connections are not."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._process = -1
        self._fs: Any = None
        self._root = ""

    def connect(self) -> tuple[Any, str]:
        """Return this process's file system and the folder's path in it.

        Raises:
            UsageError: the protocol is unknown or its package is missing.
        """
        if self._process != os.getpid():
            import fsspec

            try:
                self._fs, self._root = fsspec.core.url_to_fs(
                    self.url, skip_instance_cache=True, use_listings_cache=False
                )
            except (ImportError, ValueError) as error:
                raise UsageError(f"{self.url}: cannot be opened ({error})") from None
            self._process = os.getpid()
        return self._fs, self._root

    def path(self, name: str) -> str:
        """Return a file's path in the file system."""
        return f"{self._root.rstrip('/')}/{name}"

    def attempt(self, action: Callable[[Any], T], what: str) -> T:
        """Run an action, again after a pause if the connection failed.

        Raises:
            FileNotFoundError: as the action does, at once.
            MachineError: it failed every time, or this machine's disk did.
            DataError: it failed every time, and not by a fault that may pass: a folder is where a file should be.
        """
        fs, _root = self.connect()
        for number in range(_TRIES):
            try:
                return action(fs)
            except (FileNotFoundError, AppError):
                raise
            except Exception as error:  # each protocol has its own errors, and no common base below Exception
                if isinstance(error, OSError) and error.errno in _DISK:
                    raise
                if number == _TRIES - 1:
                    known = isinstance(error, OSError) and error.errno is not None
                    raise (blame(error) if known else MachineError)(
                        f"{self.url}: {what} failed {_TRIES} times ({type(error).__name__}: {error}); check the "
                        "connection and the credentials, then run again: what was complete is untouched"
                    ) from error
                logger.info("%s: %s failed (%s), trying again", self.url, what, error)
                time.sleep(_FIRST_WAIT_SECONDS * 2**number)
        raise AssertionError("unreachable")

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])  # type: ignore[misc]
