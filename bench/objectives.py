"""Which objective to train with, for so many steps of the student and so much compute.

    make demo
    python bench/objectives.py --shards demo/shards --out build/objectives --steps 300 --phases 2 --seeds 0

Trains a student for each objective, number of phases and seed, at equal cost, and measures all on the same
held-out layouts and noise. An objective may bring settings of [train] ("unrolled,batch_size=8") or of another
section ("phased,lora.rank=4"), and shards of its own ("lcm,shards=build/noised"). One may follow another, each
with its share of the budget ("phased>unrolled"). Differences are to the first objective, paired over layouts, the
seeds pooled; what another seed would change is seen in the lowest and highest error of a seed.

Cost is UNet work: the rows that the objective puts through the UNet for a sample, counted by running it, a forward
pass being 1 and its backward pass 1.5 with frozen weights and adapters, 2 with train.fold_adapters. The budget
is --steps optimizer steps of `phased`; others take as many steps as it pays for, each with warm-up over the
first tenth. WriteNet, which runs once a sample, is not counted; the minutes in the table have it, and the
machine's noise.

Stops and goes on: the same command continues, and more seeds, phases or objectives add to what is there.
OUT/objectives.html and .json have the table, OUT/logs what each command said.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.comparison import Kind, describe_solve, format_rows, make_rows, write_page
from bench.students import Bench, comparing_parser, label_of, setting
from common.config import load_config
from common.errors import UsageError
from common.scripts import run_script
from common.sections import TrainConfig
from shards.reading.reader import ShardSet
from stage1_teacher.measuring.teacher_sampler import recorded_grid
from stage2_student.evaluation.results import slug
from stage2_student.student.shard_facts import ShardFacts, read_facts
from stage2_student.training.phases import plan_phases
from stage2_student.training.work import UNetWork, count_work

OBJECTIVES = ("phased", "phased,loss=landing", "pcm", "unrolled", "phased>unrolled")
WARMUP_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A training by one objective."""

    text: str
    """As it was asked for, e.g. "phased,loss=landing"."""
    settings: Mapping[str, object]
    """All but the seed, by key; those of [train] without its name."""
    work: UNetWork
    shards: Path | None = None
    """If not the usual ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What is compared: stages, each started from the one before, for one number of phases."""

    text: str
    phases: int
    stages: Sequence[Stage]

    def names(self, seed: int) -> list[str]:
        """Return the student's name after each stage; other budgets make other students."""
        steps = [f"{slug(stage.text)}-{stage.settings['max_steps']}" for stage in self.stages]
        return [f"{'-then-'.join(steps[:count])}-{self.phases}-{seed}" for count in range(1, len(steps) + 1)]

    def train(self, seed: int, bench: Bench) -> None:
        """Train its student, or go on with it."""
        ancestor = None
        for name, stage in zip(self.names(seed), self.stages, strict=True):
            bench.train(name, {**stage.settings, "seed": seed}, ancestor, stage.shards)
            ancestor = name

    def kind(self, seeds: Sequence[int], bench: Bench) -> Kind:
        """Return its students, trained and measured, as a line of the table."""
        minutes = sum(bench.minutes(name) for seed in seeds for name in self.names(seed)) / len(seeds)
        facts = {
            "steps": " > ".join(str(stage.settings["max_steps"]) for stage in self.stages),
            "UNet rows, + without gradient": " > ".join(str(stage.work) for stage in self.stages),
            "minutes": f"{minutes:.1f}",
        }
        labels = [label_of(self.names(seed)[-1], self.phases) for seed in seeds]
        return Kind(name=self.text, phases=self.phases, facts=facts, labels=labels)


def plan_arms(options: argparse.Namespace, facts_of: Callable[[Path], ShardFacts]) -> list[Arm]:
    """Return what is trained, the first objective first at each number of phases.

    Args:
        options: of the command.
        facts_of: what training needs to know of a set.

    Raises:
        UsageError: an objective's settings are wrong, or do not fit the shards.
    """
    arms = []
    for phases in options.phases:
        for text in options.objectives:
            stages = text.split(">")
            found = [_plan_stage(stage, phases, options, facts_of, 1 / len(stages)) for stage in stages]
            arms.append(Arm(text=text, phases=phases, stages=found))
    return arms


def _plan_stage(
    text: str, phases: int, options: argparse.Namespace, facts_of: Callable[[Path], ShardFacts], share: float
) -> Stage:
    """Spend a share of the budget on an objective."""
    settings = {**parse_objective(text), "num_phases": phases}
    shards = Path(str(settings.pop("shards"))).absolute() if "shards" in settings else None
    usual, train = (
        load_config(options.config, [*options.set, *map(setting, values, values.values())]).train
        for values in ({}, settings)
    )
    work = count_work(train, plan_phases(train, facts_of(shards or options.shards))[0])
    budget = share * options.steps * samples_of(usual) * UNetWork(with_gradient=1, without=0).passes(usual)
    steps = max(round(budget / (work.passes(train) * samples_of(train))), 1)
    settings |= {"max_steps": steps, "warmup_steps": round(WARMUP_SHARE * steps)}
    settings["checkpoint_every"] = max(steps // 4, 1)
    return Stage(text=text, settings=settings, work=work, shards=shards)


def parse_objective(text: str) -> dict[str, object]:
    """Read OBJECTIVE[,KEY=VALUE...] as settings, those of [train] without its name.

    Raises:
        UsageError: it is none.
    """
    name, *pairs = text.split(",")
    settings = dict(pair.partition("=")[::2] for pair in pairs)
    if not name or not all(settings.values()):
        raise UsageError(f"--objectives {text!r}: expected OBJECTIVE[,KEY=VALUE...], e.g. phased,loss=landing")
    return {"objective": name, **settings}


def samples_of(train: TrainConfig) -> int:
    """Return the samples of an optimizer step."""
    return train.batch_size * train.gradient_accumulation


def main() -> None:
    """Train, measure and print, all of one seed first."""
    parser = comparing_parser(__doc__)
    parser.add_argument("--steps", type=int, default=300, help="the budget, in optimizer steps of `phased`")
    parser.add_argument("--phases", type=int, nargs="+", default=[2])
    parser.add_argument(
        "--objectives", nargs="+", default=list(OBJECTIVES), metavar="OBJECTIVE[,KEY=VALUE...][>...]"
    )
    options = parser.parse_args()
    config = load_config(options.config, options.set)
    arms = plan_arms(options, cache(lambda shards: read_facts(ShardSet.open(shards))))
    bench = Bench.from_options(options)
    for count, seed in enumerate(options.seeds, 1):
        for arm in arms:
            arm.train(seed, bench)
        references = ("--truth", "--teacher", recorded_grid(config))
        bench.evaluate([arm.names(seed)[-1] for arm in arms], *references)
        seeds = options.seeds[:count]
        rows = make_rows(bench.evaluation, [arm.kind(seeds, bench) for arm in arms])
        solve = describe_solve(bench.evaluation, config.precompute.solver_steps)
        measured = f"{bench.layouts} layouts, seeds {', '.join(map(str, seeds))}; {solve}"
        write_page(bench.out, "objectives", "Objectives at equal cost", measured, rows)
        print(f"\n{measured}\n{format_rows(rows)}\n", flush=True)


if __name__ == "__main__":
    run_script(main)
