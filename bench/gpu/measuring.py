"""Time, memory and arithmetic of a step; on a GPU that other processes of the benchmark leave alone meanwhile."""

from __future__ import annotations

import fcntl
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    gib: float | None
    """Most memory that was allocated, all that the process holds included; None without a GPU."""


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Wait until no other process of the benchmark measures; they may compile meanwhile."""
    with (out / ".measuring").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def time_step(out: Path, step: Step, rounds: int, *, warm_up: int = 2) -> Timed:
    """Time a step, each round to its end; what it compiles and allocates at first is not counted.

    Args:
        out: the benchmark's folder.
        step: does its work.
        rounds: that are timed.
        warm_up: that are not.
    """
    for _ in range(warm_up):
        step()
    finish()
    with alone(out):
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
    return Timed(seconds=statistics.median(seconds), gib=peak)


def time_stream(out: Path, step: Step, rounds: int, *, warm_up: int = 2) -> float:
    """Return the seconds of a step in a row of them, waited for at the row's end alone."""
    for _ in range(warm_up):
        step()
    finish()
    with alone(out):
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
    seconds = time_stream(out, lambda: torch.mm(a, b, out=product), 20)
    return 2 * side**3 / seconds


def free() -> None:
    """Give back what nobody holds any more, compiled code included."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
