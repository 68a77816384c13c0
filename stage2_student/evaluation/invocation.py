"""How an evaluation came about: one line per command, for whoever wants to make it again; nothing is compared."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.jsonl import LineWriter, read_objects
from common.machine import describe_machine, installed_versions

INVOCATIONS_FILE = "invocations.jsonl"
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "onnxruntime", "rapidocr-onnxruntime", "numpy")


def note_invocation(folder: Path, arguments: Sequence[str], config: dict[str, Any]) -> None:
    """Append a command to an evaluation's folder.

    Args:
        folder: of the evaluation; made if missing.
        arguments: of the process, the program first.
        config: the resolved configuration.
    """
    line: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(arguments),
        "machine": describe_machine(),
        "python": platform.python_version(),
        "packages": installed_versions(_PACKAGES),
        "config": config,
    }
    with LineWriter[dict[str, Any]](folder / INVOCATIONS_FILE) as file:
        file.append(line)


def read_invocations(folder: Path) -> list[dict[str, Any]]:
    """Return the commands of an evaluation's folder, oldest first; a line that a crash tore is left out."""
    needed = {"time", "command", "machine", "packages"}
    return [line for line in read_objects(folder / INVOCATIONS_FILE) if line.keys() >= needed]
