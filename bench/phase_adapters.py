"""Is an adapter of its own for each phase better than one for all of them? A screening, and no way to train.

    make demo
    python bench/phase_adapters.py --shards demo/shards --out build/phase_adapters --steps 300 --phases 2 --seeds 0

Trains one student on all phases ("one"); one for each phase on that alone, for as many steps in all ("one a
phase"); and these for as many steps each ("one a phase, each as long"), which costs as many times as much as there
are phases. Adapters of several phases cannot be merged into one network: who samples has to change them between
steps. So they are put together here alone. All are measured on the same held-out layouts and noise; differences
are to "one", paired over layouts, the seeds pooled. Stops and goes on: the same command continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.comparison import Kind, format_rows, make_rows, write_page
from bench.objectives import WARMUP_SHARE
from bench.students import Bench, comparing_parser, label_of, setting
from both_stages.evaluating import evaluate
from both_stages.evaluation_parts import Question
from common.config import Config, load_config
from common.errors import UsageError
from common.scripts import run_script, start_training
from common.sections import TrainConfig
from stage2_student.student.adapter import find_adapter
from stage2_student.student.sample import LoadedStudent
from stage2_student.student.student import Student
from stage2_student.train import train
from stage2_student.training import trainer
from stage2_student.training.phases import Draws, Phases, draw

KINDS = ("one", "one a phase", "one a phase, each as long")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OnePhase(Phases):
    """Phases of which a single one is trained."""

    phase: int

    @property
    def starts(self) -> tuple[int, ...]:
        """Its first state."""
        return (self.boundaries[self.phase * self.stride],)


class StudentOfPhases(Student):
    """Students that take turns: each is called in its own phase. It seems to have the first one's parts alone."""

    def __init__(self, students: Sequence[Student], timesteps: Sequence[int]) -> None:
        """Put students together.

        Args:
            students: one for each phase.
            timesteps: at which they are called.
        """
        super().__init__(students[0].unet, students[0].writenet)
        self.students, self.timesteps = nn.ModuleList(students), tuple(timesteps)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, *more: Any, **named: Any) -> Tensor:
        """Predict as the student of the phase that starts at this t."""
        eps: Tensor = self.students[self.timesteps.index(int(timesteps[0]))](
            noisy_latents, timesteps, *more, **named
        )
        return eps


@contextmanager
def trained_on(phase: int) -> Iterator[None]:
    """Let training draw from one phase."""

    def draw_one(samples: Sequence[tuple[int, int]], *, phases: Phases, **more: Any) -> Draws:
        one = OnePhase(boundaries=phases.boundaries, labels=phases.labels, stride=phases.stride, phase=phase)
        return draw(samples, phases=one, **more)

    with mock.patch.object(trainer, "draw", draw_one):
        yield


@contextmanager
def sampled_together(groups: Mapping[Path, Sequence[Path]]) -> Iterator[None]:
    """Let a student be loaded with those of its later phases.

    Args:
        groups: the run of all phases, or those of each, by the first one's adapter.
    """
    load = LoadedStudent.load

    def load_group(config: Config, adapter: Path, steps: int | None = None) -> LoadedStudent:
        found = [load(config, run, steps) for run in groups[find_adapter(adapter)]]
        if len(found) == 1:
            return found[0]
        together = StudentOfPhases([one.student for one in found], found[0].card.timesteps)
        return dataclasses.replace(found[0], student=together)

    with mock.patch.object(LoadedStudent, "load", staticmethod(load_group)):
        yield


def main() -> None:
    """Train, measure and print, all of one seed first."""
    parser = comparing_parser(__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of the student that learns all phases")
    parser.add_argument("--phases", type=int, nargs="+", default=[2])
    options = parser.parse_args()
    start_training(threads=0)
    _require_phases(load_config(options.config, options.set).train)
    bench = Bench.from_options(options)
    pairs = [(kind, phases) for phases in options.phases for kind in KINDS]
    for count, seed in enumerate(options.seeds, 1):
        groups: dict[str, list[Path]] = {}
        for kind, phases in pairs:
            groups[_name(kind, phases, seed)] = _train(kind, phases, seed, options, bench)
        _evaluate(groups, options, bench)
        rows = make_rows(bench.evaluation, [_kind(*pair, options.seeds[:count], options.steps) for pair in pairs])
        measured = f"{bench.layouts} layouts, seeds {', '.join(map(str, options.seeds[:count]))}"
        write_page(bench.out, "phase_adapters", "One adapter, or one for each phase", measured, rows)
        print(f"\n{measured}\n{format_rows(rows)}\n", flush=True)


def _require_phases(train: TrainConfig) -> None:
    """Refuse settings by which a step of training is not one of a single phase, on the grid that it is sampled on.

    Raises:
        UsageError: they are such.
    """
    expected = {"objective": "phased", "states": "starts", "grid": "trailing"}
    for key, value in expected.items():
        if getattr(train, key) != value:
            raise UsageError(
                f"--set train.{key}: received {getattr(train, key)}, expected {value} for this comparison"
            )


def _name(kind: str, phases: int, seed: int) -> str:
    return f"{kind.replace(', ', '-').replace(' ', '-')}-{phases}-{seed}"


def _kind(kind: str, phases: int, seeds: Sequence[int], steps: int) -> Kind:
    labels = [label_of(_name(kind, phases, seed), phases) for seed in seeds]
    return Kind(name=kind, phases=phases, facts={"steps": _steps(kind, phases, steps)[1]}, labels=labels)


def _steps(kind: str, phases: int, steps: int) -> tuple[int, str]:
    """Return the steps of each student, and in words."""
    if kind == KINDS[0]:
        return steps, f"{steps}"
    each = max(steps // phases, 1) if kind == KINDS[1] else steps
    return each, f"{phases} x {each}"


def _train(kind: str, phases: int, seed: int, options: argparse.Namespace, bench: Bench) -> list[Path]:
    """Train the students of a kind, or go on with them; returns their runs."""
    steps, _ = _steps(kind, phases, options.steps)
    settings = {"num_phases": phases, "seed": seed, "max_steps": steps, "checkpoint_every": steps}
    settings |= {"warmup_steps": round(WARMUP_SHARE * steps)}
    name = _name(kind, phases, seed)
    if kind == KINDS[0]:
        bench.train(name, settings)
        return [bench.run_of(name)]
    config = load_config(options.config, [*options.set, *map(setting, settings, settings.values())])
    runs = [bench.run_of(f"{name}-phase-{phase + 1}") for phase in range(phases)]
    for phase, run in enumerate(runs):
        print(f"train {run.name}", flush=True)
        with trained_on(phase):
            train(config, shards=options.shards, run=run, resume="auto")
    return runs


def _evaluate(groups: Mapping[str, Sequence[Path]], options: argparse.Namespace, bench: Bench) -> None:
    config = load_config(options.config, [*options.set, f"evaluate.num_samples={bench.layouts}"])
    students = tuple((name, runs[0]) for name, runs in groups.items())
    question = Question(annotations=(bench.annotations,), no_teacher=True, adapters=students, truth=True)
    with sampled_together({find_adapter(runs[0]): runs for runs in groups.values()}):
        evaluate(config, question, bench.evaluation, sys.argv)


if __name__ == "__main__":
    run_script(main)
