"""Running parts in processes of their own: side by side as far as they fit, each under a limit, all under one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.gpu.rows import Row, write_row

LOGS = "logs"
SIDE_BY_SIDE = 4
"""Parts at once: they measure in turn, and one compiles on the CPU while another measures."""
_LOOK_SECONDS = 0.05
_TIME_UP = "the run's time was up"


class Limited(Protocol):
    """A part, as far as its running goes."""

    @property
    def name(self) -> str:
        """Of the part."""

    @property
    def seconds(self) -> float:
        """Its limit."""

    @property
    def gib(self) -> float:
        """Of GPU memory that it takes."""


@dataclass(slots=True)
class _Running:
    part: Limited
    process: subprocess.Popen[bytes]
    until: float
    """It is ended then."""
    why: str
    """What is said of it if it is ended."""


def run_parts(
    parts: Sequence[Limited],
    out: Path,
    command: Callable[[str], Sequence[str]],
    *,
    deadline: float,
    gib: float,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run parts in order; what ends early, is ended or never begins leaves a row that says so.

    Args:
        parts: the most important first.
        out: the benchmark's folder; what a part prints goes to `logs/NAME.log` in it.
        command: of a part's name.
        deadline: a time of `time.monotonic` at which all that still runs is ended.
        gib: of GPU memory for all that run at once; a part that needs more runs alone.
        environment: of the processes; None for this one's.
    """
    (out / LOGS).mkdir(parents=True, exist_ok=True)
    waiting, running = list(parts), list[_Running]()
    try:
        while waiting or running:
            now = time.monotonic()
            running = [each for each in running if not _has_ended(each, out)]
            if now >= deadline:
                break
            left = gib - sum(each.part.gib for each in running)
            part = next((each for each in waiting if each.gib <= left or not running), None)
            if part is not None and len(running) < SIDE_BY_SIDE:
                waiting.remove(part)
                print(f"{part.name} ...", flush=True)
                process = _start(part, out, command(part.name), environment)
                limit = f"it took longer than its {part.seconds:.0f} s"
                own = now + part.seconds < deadline
                running.append(
                    _Running(part, process, now + part.seconds if own else deadline, limit if own else _TIME_UP)
                )
                continue
            time.sleep(_LOOK_SECONDS)
    finally:
        for each in running:
            _end(each)
            write_row(out, Row(part=each.part.name, case=f"{each.part.name}: ended", note=_TIME_UP))
    for part in waiting:
        write_row(out, Row(part=part.name, case=f"{part.name}: not begun", note=_TIME_UP))


def _start(
    part: Limited, out: Path, command: Sequence[str], environment: Mapping[str, str] | None
) -> subprocess.Popen[bytes]:
    with (out / LOGS / f"{part.name}.log").open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )


def _has_ended(running: _Running, out: Path) -> bool:
    name, code = running.part.name, running.process.poll()
    if code is None and time.monotonic() < running.until:
        return False
    if code is None:
        _end(running)
        write_row(out, Row(part=name, case=f"{name}: ended", note=running.why))
    elif code:
        note = f"exit code {code}, see {LOGS}/{name}.log"
        write_row(out, Row(part=name, case=f"{name}: failed", note=note))
    return True


def _end(running: _Running) -> None:
    """End a part with all that it started: compilers have processes of their own."""
    with suppress(ProcessLookupError):
        os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()
