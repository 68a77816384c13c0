"""Work done behind the caller: in one thread of its own, in order, while the caller goes on."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Behind:
    """Does pieces of work one after the other in a thread; a context manager.

    The first error of a piece is raised in the caller's thread, by the next call or at the context's end; after it
    no further piece begins. A context that an exception leaves drops what has not begun and waits for what has.
    Without a thread each piece is done at once, by the caller: the same calls in the same order.

    Example:
        with Behind("write", threaded=True) as writing:
            for batch in batches:
                writing.do(partial(write, batch))
    """

    def __init__(
        self,
        name: str,
        *,
        threaded: bool,
        most_waiting: int = 2,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Start no thread yet; the first piece does.

        Args:
            name: of the thread, and of the work in the log.
            threaded: False does each piece in `do`.
            most_waiting: pieces, the one in work included, beyond which `do` waits for the oldest.
            within: makes the context that each piece runs in, threaded or not.
        """
        self._name, self._most_waiting, self._within = name, most_waiting, within
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name) if threaded else None
        self._waiting: deque[Future[Any]] = deque()
        self._gate = threading.Lock()
        self._failure: BaseException | None = None
        self._dropped = False

    def do(self, piece: Callable[[], T]) -> Future[T]:
        """Take on a piece of work.

        Returns:
            Its result to be; what asks an unfinished one for it gets the first error instead, if there was one.

        Raises:
            BaseException: an earlier piece's; without a thread this piece's too.
        """
        if self._pool is None:
            done: Future[T] = Future()
            done.set_result(self._run(piece))
            return done
        self._raise_failure()
        while len(self._waiting) >= self._most_waiting:
            wait([self._waiting.popleft()])
            self._raise_failure()
        future = self._pool.submit(self._run, piece)
        self._waiting.append(future)
        return future

    def ahead(self, pieces: Iterable[Callable[[], T]], count: int = 1) -> Iterator[T]:
        """Yield the results of pieces in order, up to `count` further pieces taken on while the caller uses one.

        The iterable is advanced in the caller's thread. Without a thread nothing is done ahead.
        """
        futures: deque[Future[T]] = deque()
        for piece in pieces:
            futures.append(self.do(piece))
            if self._pool is None or len(futures) > count:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for the piece in work, and let none begin for as long as the context lasts."""
        with self._gate:
            yield

    def finish(self) -> None:
        """Wait for all pieces.

        Raises:
            BaseException: the first error of a piece.
        """
        while self._waiting:
            wait([self._waiting.popleft()])
        self._raise_failure()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._dropped = kind is not None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=self._dropped)
        if kind is None:
            self._raise_failure()
        elif self._failure is not None and error is not self._failure:
            logger.warning("%s: failed too: %s", self._name, self._failure)

    def _run(self, piece: Callable[[], T]) -> T:
        self._raise_failure()
        if self._dropped:
            raise CancelledError
        try:
            with self._gate, self._within():
                return piece()
        except BaseException as error:
            self._failure = error
            raise

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
