from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from common import logs
from common.config import PROJECT_ROOT


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = dict(logs._ABOUT)
    yield
    logs._ABOUT.update(before)


def record() -> logging.LogRecord:
    return logging.LogRecord("shards.x", logging.INFO, __file__, 1, "made %d, é", (3,), None)


def test_a_line_says_when_where_and_by_which_task() -> None:
    host = re.escape(socket.gethostname())
    assert re.fullmatch(
        rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d INFO {host}: made 3, é", logs._TextLines().format(record())
    )
    logs.name_task("task 3/16")
    assert f"INFO {socket.gethostname()} task 3/16: made 3, é" in logs._TextLines().format(record())


def test_a_json_line_has_the_same_and_an_exception() -> None:
    logs.name_task("task 3/16")
    line = record()
    try:
        raise ValueError("no")
    except ValueError:
        line.exc_info = sys.exc_info()
    text = logs._JsonLines().format(line)
    values = json.loads(text)
    assert "\n" not in text and values["exception"].endswith("ValueError: no")
    assert (values["level"], values["task"], values["message"]) == ("INFO", "task 3/16", "made 3, é")
    assert (
        re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", values["time"]) and values["logger"] == "shards.x"
    )


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "pipeline.py", *arguments]
    return subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)


def test_errors_are_json_too_where_that_is_asked_for() -> None:
    done = run("status", "--log-format", "json", "--shards", "no-such-folder")
    values = json.loads(done.stderr)
    assert done.returncode == values["exit_code"] == 3 and "no such folder" in values["message"]
    done = run("status", "--shards", "no-such-folder", "--log-format=xml")
    assert done.returncode == 2 and done.stderr == "error: --log-format: received 'xml', expected text or json\n"
