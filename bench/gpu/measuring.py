"""Time, memory and arithmetic of a step; on a GPU that other processes of the benchmark leave alone meanwhile."""

from __future__ import annotations

import fcntl
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.inputs import finish

Step = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """What a step takes."""

    seconds: float
    """The median."""
    first: float
    """Of the first call, not counted above, compiling included."""
    gib: float | None
    """Most memory that was allocated, all that the process holds included; None without a GPU."""


_depth = 0


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Wait until no other process of the benchmark has the GPU to itself; they may load and compile meanwhile.

    May be entered within itself.
    """
    global _depth
    with ExitStack() as held:
        if not _depth:
            fcntl.flock(held.enter_context((out / ".measuring").open("w")), fcntl.LOCK_EX)
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


def time_step(out: Path, step: Step, rounds: int) -> Timed:
    """Time a step, each round to its end, alone; what it compiles and allocates at first is not counted.

    Args:
        out: the benchmark's folder.
        step: does its work. Its first call may compile for minutes and is made beside other processes.
        rounds: that are timed.
    """
    before = time.perf_counter()
    step()
    finish()
    first = time.perf_counter() - before
    with alone(out):
        for _ in range(2):
            step()
        finish()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(rounds):
            before = time.perf_counter()
            step()
            finish()
            seconds.append(time.perf_counter() - before)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return Timed(seconds=statistics.median(seconds), first=first, gib=peak)


def time_stream(out: Path, step: Step, rounds: int) -> float:
    """Return the seconds of a step in a row of them, waited for at the row's end only; one more goes before."""
    with alone(out):
        step()
        finish()
        before = time.perf_counter()
        for _ in range(rounds):
            step()
        finish()
        return (time.perf_counter() - before) / rounds


def count_flops(step: Step) -> int:
    """Return the floating-point operations of a step, a multiplication and its addition being two."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


@cache
def matmul_rate(out: Path, side: int, dtype: torch.dtype) -> float:
    """Return the operations a second of a large square matrix product: what the hardware gives in practice."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    rows = [
        time_stream(out, lambda: torch.mm(a, b, out=product), 20) for _ in range(5)
    ]  # its clocks rise at first
    return 2 * side**3 / statistics.median(rows)


def free() -> None:
    """Give back what nobody holds any more, compiled code included."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
