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
SIDE_BY_SIDE = 3
"""Parts at once: they measure in turn, and one compiles on the CPU while another measures."""
_LOOK_SECONDS = 0.05


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
            if now >= deadline:
                break
            left = gib - sum(each.part.gib for each in running)
            part = next((each for each in waiting if each.gib <= left or not running), None)
            if part is not None and len(running) < SIDE_BY_SIDE:
                waiting.remove(part)
                print(f"{part.name} ...", flush=True)
                running.append(
                    _start(part, out, command(part.name), min(deadline, now + part.seconds), environment)
                )
                continue
            time.sleep(_LOOK_SECONDS)
            running = [each for each in running if not _has_ended(each, out)]
    finally:
        for each in running:
            _end(each)
            write_row(out, Row(part=each.part.name, case=f"{each.part.name}: ended", note="the run's time was up"))
    for part in waiting:
        write_row(out, Row(part=part.name, case=f"{part.name}: not begun", note="the run's time was up"))


def _start(
    part: Limited, out: Path, command: Sequence[str], until: float, environment: Mapping[str, str] | None
) -> _Running:
    with (out / LOGS / f"{part.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    return _Running(part, process, until)


def _has_ended(running: _Running, out: Path) -> bool:
    name, code = running.part.name, running.process.poll()
    if code is None and time.monotonic() < running.until:
        return False
    if code is None:
        _end(running)
        note = f"it took longer than its {running.part.seconds:.0f} s"
        write_row(out, Row(part=name, case=f"{name}: ended", note=note))
    elif code:
        note = f"exit code {code}, see {LOGS}/{name}.log"
        write_row(out, Row(part=name, case=f"{name}: failed", note=note))
    return True


def _end(running: _Running) -> None:
    """End a part with all that it started: compilers have processes of their own."""
    with suppress(ProcessLookupError):
        os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()
