"""The benchmark's parts, the most important first: what each may take, and which belong to `quick`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.gpu import solving, training
from bench.gpu.place import Place
from bench.gpu.rows import Aim
from common.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is measured in a process of its own."""

    name: str
    run: Callable[[Place], None]
    seconds: float
    """After which it is ended, imports and compiling included."""
    gib: float
    """Of GPU memory that it takes at most, about."""
    quick: bool = False


PARTS = {
    part.name: part
    for part in (
        Part(name="step-best", run=training.step_best, seconds=215, gib=24, quick=True),
        Part(name="solve-best", run=solving.solve_best, seconds=215, gib=8, quick=True),
        Part(name="step-today", run=training.step_today, seconds=90, gib=32, quick=True),
        Part(name="solve-today", run=solving.solve_today, seconds=100, gib=10, quick=True),
        Part(name="step-values", run=training.step_values, seconds=90, gib=32, quick=True),
        Part(name="devices", run=solving.compare_devices, seconds=100, gib=10, quick=True),
        Part(name="shards", run=training.shards, seconds=150, gib=24),
        Part(name="online", run=training.online, seconds=300, gib=40),
        Part(name="deterministic", run=training.deterministic, seconds=120, gib=24),
        Part(name="cards", run=training.cards, seconds=240, gib=24),
        Part(name="profile", run=training.profile, seconds=150, gib=32),
        Part(name="step-variants", run=training.step_variants, seconds=300, gib=32),
        Part(name="solve-variants", run=solving.solve_variants, seconds=250, gib=12),
        Part(name="step-graphs", run=training.step_graphs, seconds=200, gib=40),
        Part(name="encoding", run=solving.encoding, seconds=60, gib=8),
    )
}
QUICK, ALL = "quick", "all"
SECONDS = {QUICK: 220.0, ALL: 520.0}
"""That a whole run may take, making weights and inputs included: some seconds less than 4 and 9 minutes."""

_PRECOMPUTE, _SHARDS = "precompute, every improvement", "step, from shards, 1 workers"
AIMS = (
    Aim(
        what="`precompute` over the bare loop of the same UNet calls",
        case=_PRECOMPUTE,
        baseline="bare loop of 40 calls, the same",
        least=0.95,
    ),
    Aim(
        what="`precompute`'s arithmetic over the matrix product's",
        case=_PRECOMPUTE,
        field="of_matmul",
        least=0.45,
    ),
    Aim(what="`precompute` over `precompute` as it was", case=_PRECOMPUTE, baseline="precompute, as it was"),
    Aim(
        what="a step over plain eager PEFT under autocast",
        case=training.BEST,
        baseline=training.PEFT,
        least=2.5,
    ),
    Aim(
        what="a step's arithmetic over the matrix product's",
        case=training.BEST,
        field="of_matmul",
        least=0.35,
    ),
    Aim(what="GiB of that step", case=training.BEST, field="gib", most=20),
    Aim(what="from shards over in memory", case=_SHARDS, baseline="step, one batch in memory", least=0.97),
    Aim(
        what="a step over the online teacher's, eager",
        case=training.BEST,
        baseline="step, online teacher, eager",
        least=4,
    ),
    Aim(
        what="a step over the online teacher's, every improvement",
        case=training.BEST,
        baseline="step, online teacher, every improvement",
        least=2,
    ),
    Aim(
        what="bits of a resumed run that differ (0 or 1)",
        case="weights of a resumed run against an unbroken one's, 1 if any bit differs",
        field="error",
        most=0,
    ),
)


def choose(names: Sequence[str]) -> tuple[list[Part], float]:
    """Return the parts that names stand for, in order of importance, and the seconds that all of them may take.

    Raises:
        UsageError: there is no such part.
    """
    known = [*SECONDS, *PARTS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"part {unknown[0]!r}: expected one of {', '.join(known)}")
    chosen = [
        part for part in PARTS.values() if ALL in names or part.name in names or (QUICK in names and part.quick)
    ]
    whole = [SECONDS[name] for name in names if name in SECONDS]
    return chosen, max(whole, default=60 + sum(part.seconds for part in chosen))
