"""The log on stderr: one line each, with the date, the machine and the task, as text or as JSON.

What many tasks write ends up in one place: a line must say by itself when and by whom it was written.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import click

Format = Literal["text", "json"]

_ABOUT: dict[str, Any] = {"format": "text", "task": "", "packages": ()}


def set_up_logging(packages: Sequence[str], *, debug: bool, log_format: Format) -> None:
    """Log to stderr: only warnings of other libraries, and of a run's other processes than the first.

    Args:
        packages: those whose progress is logged.
        debug: log more of them.
        log_format: of the lines.
    """
    _ABOUT.update(format=log_format, packages=tuple(packages))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if log_format == "json" else _TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    level = logging.DEBUG if debug else logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    for package in packages:
        logging.getLogger(package).setLevel(level)


def name_task(task: str) -> None:
    """Name this process in every line that it logs from now on, e.g. "task 3/16"."""
    _ABOUT["task"] = task


def quieten() -> None:
    """Log warnings alone from now on: this is not the first process of its run."""
    for package in _ABOUT["packages"]:
        logging.getLogger(package).setLevel(logging.WARNING)


def print_error(message: str, exit_code: int) -> None:
    """Print the one line with which a command ends."""
    line = f"error: {message}"
    if _ABOUT["format"] == "json":
        line = json.dumps(_values(time.time(), "ERROR", message) | {"exit_code": exit_code}, ensure_ascii=False)
    click.echo(line, err=True)


def _values(seconds: float, level: str, message: str) -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{seconds % 1 * 1000:03.0f}Z",
        "level": level,
        "host": socket.gethostname(),
        "task": _ABOUT["task"],
        "message": message,
    }


class _TextLines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(where)s: %(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record.where = " ".join(filter(None, (socket.gethostname(), _ABOUT["task"])))
        return super().format(record)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        values = _values(record.created, record.levelname, record.getMessage()) | {"logger": record.name}
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False)
