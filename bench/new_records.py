"""What helps a student more: fresh solves of the teacher, or the teacher's answers to its own states?

    make demo
    python bench/new_records.py --shards demo/shards --inputs demo/data/data.json --out build/records

A student is trained on --shards. Then it goes on for as many steps again: on --shards itself ("same"), on new
solves of the same inputs ("fresh"), or on what `precompute --states-from` records of the student ("own states").
The last two are drawn with the same new seed, which keys noise and renderings, and cost the teacher the same work;
"same" costs it none. All are measured on the same held-out layouts and noise; differences are to "same", paired
over layouts, the seeds pooled. Stops and goes on: the same command continues.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.comparison import Kind, format_rows, make_rows, write_page
from bench.students import Bench, comparing_parser, label_of
from common.scripts import run_script

SETS = ("same", "fresh", "own states")
FRESH_SEED = 1000
"""Added to a student's seed, it keys the noise of its fresh solves, and of those from its own states."""


def main() -> None:
    """Train, record, train on, measure and print, all of one seed first."""
    parser = comparing_parser(__doc__)
    parser.add_argument("--inputs", type=Path, required=True, help="annotations that --shards was made of")
    parser.add_argument("--steps", type=int, default=200, help="of training, before and after")
    parser.add_argument("--phases", type=int, nargs="+", default=[2])
    options = parser.parse_args()
    bench = Bench.from_options(options)

    def name_of(which: str, phases: int, seed: int) -> str:
        return f"{which.replace(' ', '-')}-{options.steps}-{phases}-{seed}"

    def make_set(which: str, phases: int, seed: int) -> Path:
        noise = ("--set", f"precompute.seed={FRESH_SEED + seed}")
        if which == "fresh":
            return bench.precompute(f"fresh-{seed}", options.inputs, *noise)
        student = bench.run_of(name_of("first", phases, seed))
        name = name_of(which, phases, seed)
        return bench.precompute(name, options.inputs, *noise, "--states-from", student)

    def kind_of(which: str, phases: int, seeds: list[int]) -> Kind:
        labels = [label_of(name_of(which, phases, seed), phases) for seed in seeds]
        return Kind(
            name=which, phases=phases, facts={"steps": f"{options.steps} > {options.steps}"}, labels=labels
        )

    pairs = [(which, phases) for phases in options.phases for which in SETS]
    for count, seed in enumerate(options.seeds, 1):
        for phases in options.phases:
            settings = {"num_phases": phases, "max_steps": options.steps, "checkpoint_every": options.steps}
            first = name_of("first", phases, seed)
            bench.train(first, {**settings, "seed": seed})
            for which in SETS:
                shards = None if which == "same" else make_set(which, phases, seed)
                # Another order of samples than before, where the set is the same.
                bench.train(name_of(which, phases, seed), {**settings, "seed": FRESH_SEED + seed}, first, shards)
        bench.evaluate([name_of(*pair, seed) for pair in pairs], "--truth", "--no-teacher")
        seeds = options.seeds[:count]
        rows = make_rows(bench.evaluation, [kind_of(*pair, seeds) for pair in pairs])
        measured = f"{bench.layouts} layouts, seeds {', '.join(map(str, seeds))}"
        write_page(bench.out, "new_records", "What a student goes on with", measured, rows)
        print(f"\n{measured}\n{format_rows(rows)}\n", flush=True)


if __name__ == "__main__":
    run_script(main)
