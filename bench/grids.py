"""What AnyText2's own grid costs a student: its endpoint error beside that of a student of the trailing grid.

    make demo
    python bench/grids.py --shards demo/shards --out build/grids

Trains pairs of students on the same shards, alike but for `train.grid`, for each number of steps and each seed,
and measures all on the same held-out layouts and noise. Differences are to the trailing grid, paired over layouts,
the seeds pooled. Stops and goes on: the same command continues.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.comparison import Kind, format_rows, make_rows, write_page
from bench.students import Bench, comparing_parser, label_of
from common.scripts import run_script

GRIDS = ("trailing", "upstream")


def main() -> None:
    """Train, measure and print, all of one seed first."""
    parser = comparing_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--phases", type=int, nargs="+", default=[4, 8, 2])
    options = parser.parse_args()
    bench = Bench.from_options(options)

    def name_of(grid: str, phases: int, seed: int) -> str:
        return f"{grid}-{options.steps}-{phases}-{seed}"

    def kind_of(grid: str, phases: int, seeds: list[int]) -> Kind:
        labels = [label_of(name_of(grid, phases, seed), phases) for seed in seeds]
        return Kind(name=grid, phases=phases, facts={"steps": str(options.steps)}, labels=labels)

    pairs = [(grid, phases) for phases in options.phases for grid in GRIDS]
    for count, seed in enumerate(options.seeds, 1):
        for grid, phases in pairs:
            settings = {"grid": grid, "num_phases": phases, "seed": seed, "max_steps": options.steps}
            bench.train(name_of(grid, phases, seed), {**settings, "checkpoint_every": options.steps})
        bench.evaluate([name_of(*pair, seed) for pair in pairs], "--no-teacher")
        seeds = options.seeds[:count]
        rows = make_rows(bench.evaluation, [kind_of(*pair, seeds) for pair in pairs])
        measured = (
            f"{bench.layouts} layouts, {options.steps} steps of training, seeds {', '.join(map(str, seeds))}"
        )
        write_page(bench.out, "grids", "Grids of students", measured, rows)
        print(f"\n{measured}\n{format_rows(rows)}\n", flush=True)


if __name__ == "__main__":
    run_script(main)
