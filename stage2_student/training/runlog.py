"""The log of a run: one JSON object a line, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from common.files import write_bytes_atomic

LOG_FILE = "log.jsonl"
TENSORBOARD_DIR = "tensorboard"


class RunLog:
    """Appends to a run's log; a context manager. Lines beyond the step resumed from are dropped first."""

    def __init__(self, run: Path, step: int) -> None:
        """Open the log.

        Args:
            run: the run's folder.
            step: optimizer steps done; what an interrupted run logged after them will be logged again.
        """
        from torch.utils.tensorboard import SummaryWriter  # a second of imports that only a training run needs

        path = run / LOG_FILE
        if path.exists():
            write_bytes_atomic(path, b"".join(line + b"\n" for line in _lines_up_to(path, step)))
        self._file = path.open("ab")
        self._board = SummaryWriter(str(run / TENSORBOARD_DIR), purge_step=step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()

    def write(self, step: int, facts: dict[str, Any]) -> None:
        """Append a line; a number that is not finite becomes null.

        Args:
            step: optimizer steps done.
            facts: numbers by name.
        """
        values = {name: value if math.isfinite(value) else None for name, value in facts.items()}
        self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        self._file.flush()
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)


def _lines_up_to(path: Path, step: int) -> list[bytes]:
    return [json.dumps(line).encode() for line in _parse(path) if line["step"] <= step]


def _parse(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:  # half a line, of a run that was killed
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, oldest first; none if it has no log. A half-written line is left out."""
    path = run / LOG_FILE
    return _parse(path) if path.exists() else []
