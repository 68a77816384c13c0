"""How far a student gets with how many inputs and how many steps: endpoint error against both.

    python -m stage1_teacher.tiny.data --count 1000 --seed 5 --out build/curve/data
    python bench/data_curve.py --inputs build/curve/data/data.json --counts 100 1000 --out build/curve

Records the first of the inputs, so many and so many, trains a student on each set, and measures its checkpoints
on the same held-out layouts and noise. Stops and goes on: the same command continues. OUT/data_curve.html has the
chart, .json the figures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.comparison import Along, Kind, format_rows, make_rows, write_page
from bench.students import Bench, comparing_parser, label_of
from common.errors import UsageError
from common.scripts import run_script
from stage2_student.student.checkpoint_folders import CHECKPOINTS_DIR, checkpoint_name


def main() -> None:
    """Record, train, measure and print."""
    parser = comparing_parser(__doc__, shards=False)
    parser.add_argument("--inputs", type=Path, required=True, help="annotations")
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000], help="of the inputs, the first ones")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[100, 200, 400, 800], help="multiples of the first"
    )
    parser.add_argument("--phases", type=int, default=2)
    options = parser.parse_args()
    bench = Bench.from_options(options)
    steps, phases = sorted(options.steps), options.phases
    if any(step % steps[0] for step in steps):
        raise UsageError(f"--steps: received {steps}, expected multiples of the first one, {steps[0]}")
    inputs = len(json.loads(options.inputs.read_bytes())["data_list"])
    if max(options.counts) > inputs:
        raise UsageError(
            f"--counts: received {max(options.counts)}, expected at most the {inputs} of {options.inputs}"
        )

    def name_of(count: int, seed: int) -> str:
        return f"{count}-inputs-{phases}-{seed}"

    def kind_of(count: int, step: int) -> Kind:
        labels = [label_of(f"{name_of(count, seed)}-at-{step}", phases) for seed in options.seeds]
        return Kind(name=f"{count} inputs", phases=phases, facts={"steps": f"{step}"}, labels=labels)

    students = {}
    for count in sorted(options.counts):
        shards = bench.precompute(f"{count}", options.inputs, "--limit", count)
        for seed in options.seeds:
            settings = {"num_phases": phases, "seed": seed, "max_steps": steps[-1], "checkpoint_every": steps[0]}
            bench.train(name_of(count, seed), settings, shards=shards)
            folder = bench.run_of(name_of(count, seed)) / CHECKPOINTS_DIR
            students |= {f"{name_of(count, seed)}-at-{step}": folder / checkpoint_name(step) for step in steps}
    bench.evaluate(students, "--truth", "--no-teacher")
    rows = make_rows(
        bench.evaluation, [kind_of(count, step) for count in sorted(options.counts) for step in steps]
    )
    seeds = ", ".join(map(str, options.seeds))
    measured = (
        f"{bench.layouts} layouts, students of {phases} steps, seeds {seeds}; differences are to the first line"
    )
    along = Along(name="steps", place=lambda row: int(row.facts["steps"]))
    write_page(bench.out, "data_curve", "Inputs and steps of training", measured, rows, along)
    print(f"\n{measured}\n{format_rows(rows)}\n", flush=True)


if __name__ == "__main__":
    run_script(main)
