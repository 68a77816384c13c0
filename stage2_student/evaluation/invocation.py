"""How an evaluation came about: one line per command, for whoever wants to make it again; nothing is compared."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.files import canonical_json

INVOCATIONS_FILE = "invocations.jsonl"
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "onnxruntime", "rapidocr-onnxruntime", "numpy")


def note_invocation(folder: Path, arguments: Sequence[str], config: dict[str, Any]) -> None:
    """Append a command to an evaluation's folder, on a line of its own even where a crash tore the last one.

    Args:
        folder: of the evaluation; made if missing.
        arguments: of the process, the program first.
        config: the resolved configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(arguments),
        "machine": f"{_processor()}, {os.cpu_count()} cores{_accelerator()}",
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "config": config,
    }
    with (folder / INVOCATIONS_FILE).open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(canonical_json(line))


def read_invocations(folder: Path) -> list[dict[str, Any]]:
    """Return the commands of an evaluation's folder, oldest first; a line that a crash tore is left out."""
    path = folder / INVOCATIONS_FILE
    lines = []
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.keys() >= {"time", "command", "machine", "packages"}:
            lines.append(line)
    return lines


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _accelerator() -> str:
    import sys

    torch = sys.modules.get("torch")  # scoring a folder of images does not need it
    return f", {torch.cuda.get_device_name()}" if torch is not None and torch.cuda.is_available() else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
