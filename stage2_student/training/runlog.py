"""The log of a run: one JSON object a line, and the same numbers for its trackers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from common.config import Config
from common.files import write_bytes_atomic
from common.jsonl import LineWriter, read_objects
from stage2_student.training.trackers import Trackers

LOG_FILE = "log.jsonl"


class RunLog:
    """Appends to a run's log; a context manager. Lines beyond the step resumed from are dropped first."""

    def __init__(self, run: Path, step: int, config: Config) -> None:
        """Open the log.

        Args:
            run: the run's folder.
            step: optimizer steps done; what an interrupted run logged after them will be logged again.
            config: its trackers.

        Raises:
            UsageError: a tracker did not start.
        """
        path = run / LOG_FILE
        if path.exists():
            write_bytes_atomic(path, b"".join(_encode(line) for line in read_log(run) if line["step"] <= step))
        self._file = LineWriter(path, encode=_encode)
        self._trackers = Trackers(run, config, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._trackers.close()

    def write(self, step: int, facts: dict[str, Any]) -> None:
        """Append a line; a number that is not finite becomes null.

        Args:
            step: optimizer steps done.
            facts: numbers by name.
        """
        values = {name: value if math.isfinite(value) else None for name, value in facts.items()}
        self._file.append({"step": step, **values})
        self._trackers.log(step, {name: value for name, value in values.items() if value is not None})


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, oldest first; none if it has no log. A half-written line is left out."""
    return [line for line in read_objects(run / LOG_FILE) if "step" in line]


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"
