"""The page's server: the page's own files, what it may ask for, and one request sampled after the other."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from both_stages.examples import examples
from both_stages.page.asked import Limits, read_asked
from both_stages.page.models import Gone, Made, Models, TooLong, stopping
from common.config import Config
from common.errors import UsageError, reason
from common.faults import explain, raise_disk_fault

logger = logging.getLogger(__name__)

FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
_HEADERS = {
    # The browser itself refuses what is not from here, so that nobody learns of the page's use.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_LEAVE_SECONDS = 10
"""That connections have to end when the server does."""


class Refused(Exception):
    """A request that is not sampled; its status and message go to the browser."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Page:
    """Answers the browser."""

    def __init__(self, config: Config, models: Models, limits: Limits) -> None:
        """Take what is loaded.

        Args:
            config: inputs is used.
            models: that sample.
            limits: of requests.
        """
        self._config, self._models, self._limits = config, models, limits
        self._waiting = 0  # requests that are sampled or wait for it; changed by the event loop alone
        self._turn = asyncio.Lock()
        self._ended = threading.Event()

    def app(self, hosts: tuple[str, ...]) -> Starlette:
        """Return the application.

        Args:
            hosts: names by which a browser may call it; a page elsewhere could else point a name of its own here.
        """
        routes = [Route(path, partial(self._file, *file)) for path, file in FILES.items()]
        routes += [Route("/settings", self._settings), Route("/sample", self._sample, methods=["POST"])]
        return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))])

    def stop(self) -> None:
        """End what is being sampled before its next call of the UNet."""
        self._ended.set()

    async def _file(self, name: str, kind: str, request: Request) -> Response:
        content = Path(__file__).with_name(name).read_bytes()
        return Response(content, media_type=kind, headers=_HEADERS)

    async def _settings(self, request: Request) -> Response:
        inputs, limits = self._config.inputs, self._limits
        content = {
            "size": inputs.size,
            "fonts": sorted(inputs.fonts),
            "models": self._models.describe(),
            "max_images": limits.max_images,
            "max_steps": limits.max_steps,
            "max_lines": min(inputs.max_lines, limits.max_lines),
            "max_bytes": limits.max_bytes,
            "examples": examples(inputs.size, sorted(inputs.fonts)),
        }
        return JSONResponse(content, headers=_HEADERS)

    async def _sample(self, request: Request) -> Response:
        try:
            body = await self._body(request)
            made, doubts = await self._in_turn(request, body)
        except ClientDisconnect:
            return Response(status_code=499)
        except Refused as error:
            return _failed(error.status, str(error))
        except Exception as error:  # a bug ends the request and not the server
            ending = explain(error)
            if ending is None:
                logger.exception("a request failed")
                return _failed(500, "a bug ended this request; the server's log says where")
            message, code = ending
            return _failed(400 if code in (2, 3) else 503, message)
        return JSONResponse({"made": [asdict(one) for one in made], "doubts": doubts}, headers=_HEADERS)

    async def _body(self, request: Request) -> bytes:
        """Receive a request whole, if it is one of this page's and not too large or slow."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "expected JSON")  # which a form of another page cannot send
        parts, size, most = [], 0, self._limits.max_bytes
        try:
            async with asyncio.timeout(self._limits.read_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise Refused(413, f"the request is larger than {most >> 20} MiB; choose a smaller image")
                    parts.append(part)
        except TimeoutError:
            raise Refused(
                408, f"the request did not arrive within {self._limits.read_seconds:g} seconds"
            ) from None
        return b"".join(parts)

    async def _in_turn(self, request: Request, body: bytes) -> tuple[list[Made], list[str]]:
        """Sample a request when those before it are done."""
        asked = read_asked(body, self._limits, self._models.names, sorted(self._config.inputs.fonts))
        if self._waiting >= self._limits.max_waiting:
            raise Refused(503, f"{self._waiting} requests are waiting already; try again in a moment")
        gone, seconds = threading.Event(), self._limits.max_seconds
        self._waiting += 1
        watch = asyncio.create_task(_watch(request, gone))
        try:
            async with self._turn:
                if gone.is_set():
                    raise ClientDisconnect
                check = stopping(lambda: gone.is_set() or self._ended.is_set(), seconds)
                return await asyncio.to_thread(self._models.sample, asked, check)
        except Gone:
            raise ClientDisconnect from None
        except TooLong:
            raise Refused(
                503, f"stopped after {seconds:g} seconds, which is the limit here; ask for fewer steps or images"
            ) from None
        finally:
            watch.cancel()
            self._waiting -= 1


def _failed(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status, headers=_HEADERS)


async def _watch(request: Request, gone: threading.Event) -> None:
    """Set an event when the browser has hung up."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
    gone.set()


class _Server(uvicorn.Server):
    """Ends what is being sampled when it is asked to end."""

    def __init__(self, page: Page, hosts: tuple[str, ...]) -> None:
        config = uvicorn.Config(
            page.app(hosts),
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=64,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_LEAVE_SECONDS,
        )
        super().__init__(config)
        self._page = page

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        self._page.stop()
        super().handle_exit(sig, frame)


def serve(
    config: Config,
    students: Mapping[str, Path],
    *,
    host: str,
    port: int,
    limits: Limits,
    announce: Callable[[str], None],
) -> None:
    """Serve the page until a signal ends it.

    Args:
        config: see `ImageSampler`.
        students: adapters by name.
        host: address to listen at.
        port: likewise; 0 for any that is free.
        limits: of requests.
        announce: told where the page is.

    Raises:
        UsageError: nothing can listen there; and as `Models`.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) not in (errno.EACCES, errno.EADDRINUSE, errno.EADDRNOTAVAIL):
            raise_disk_fault(error)
        raise UsageError(f"--host {host} --port {port}: {reason(error)}; give another") from None
    with listening:
        page = Page(config, Models(config, students), limits)
        shown = f"[{host}]" if ":" in host else host
        announce(f"http://{shown}:{listening.getsockname()[1]}/ is the page; Ctrl-C ends it")
        server = _Server(page, LOOPBACK if host in LOOPBACK else ("*",))
        try:
            server.run(sockets=[listening])
        finally:
            page.stop()
