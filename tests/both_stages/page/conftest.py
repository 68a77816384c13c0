from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import uvicorn

from both_stages.page.asked import Limits
from both_stages.page.models import Models
from both_stages.page.server import LOOPBACK, Page
from common.config import Config
from tests.fresh_student import write_fresh_student
from tests.stage1_teacher.small_teacher import FONT, load, write_teacher

Answer = tuple[int, dict[str, Any]]
Ask = Callable[..., Answer]


@pytest.fixture(scope="package")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    torch.set_num_threads(1)
    path = write_teacher(tmp_path_factory.mktemp("page"))
    return load(path, "lora.rank=2", f"inputs.fonts.other={FONT}")


@pytest.fixture(scope="package")
def models(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Models:
    run = tmp_path_factory.mktemp("students") / "two"
    write_fresh_student(run, config)
    return Models(config, {"two": run})


@contextmanager
def serving(config: Config, models: Models, limits: Limits) -> Iterator[int]:
    """Serve the page on any free port, in a thread; yields the port."""
    server = uvicorn.Server(uvicorn.Config(Page(config, models, limits).app(LOOPBACK), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def ask(port: int, content: Any, **headers: str) -> Answer:
    """Send a request as the page does; bytes go as they are."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=200)
    kind = {"Content-Type": "application/json"}
    connection.request(
        "POST", "/sample", body, kind | {name.replace("_", "-"): value for name, value in headers.items()}
    )
    answer = connection.getresponse()
    data = answer.read()
    return answer.status, json.loads(data) if data.startswith(b"{") else {"error": data.decode()}


@pytest.fixture(scope="package")
def port(config: Config, models: Models) -> Iterator[int]:
    with serving(config, models, Limits(max_bytes=200_000)) as port:
        yield port
