"""Loss curves of students with folded adapters against PEFT's, and against what another seed changes.

    python bench/loss_curves.py --shards demo/shards --held-out demo/held_out_shards --seeds 3

Every seed is trained twice, from the same first weights on the same samples in the same order, once with
train.fold_adapters. What folding changes is the gap between the two; the spread is that between seeds with PEFT.
Aim: over all steps a gap below the spread. In half precision: --set train.mixed_precision=bf16.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from accelerate.state import AcceleratorState

from bench.inputs import bench_parser
from common.config import Config, load_config
from common.scripts import run_script
from stage2_student.train import train
from stage2_student.training.runlog import read_log

Curve = Mapping[int, float]
"""A loss by step."""
LOSSES = ("loss", "held_out_loss")


def curves_of(config: Config, shards: Path, held_out: Path, run: Path) -> dict[str, Curve]:
    """Train a student and return its losses, by name."""
    AcceleratorState._reset_state(reset_partial_state=True)
    lines = read_log(train(config, shards=shards, run=run, held_out=held_out).run)
    return {name: {line["step"]: line[name] for line in lines if name in line} for name in LOSSES}


def table_of(name: str, plain: Sequence[Curve], folded: Sequence[Curve]) -> list[str]:
    """Return a table's lines: mean losses, spread of PEFT's seeds, gap to folded; the last is of all steps."""
    lines, spreads, gaps = [f"{name:<16}{'PEFT':>10}{'folded':>10}{'spread':>10}{'gap':>10}"], [], []
    for step in plain[0]:
        values, others = [curve[step] for curve in plain], [curve[step] for curve in folded]
        spreads.append(statistics.stdev(values))
        gaps.append(root_mean_square([a - b for a, b in zip(values, others, strict=True)]))
        means = f"{statistics.mean(values):>10.5f}{statistics.mean(others):>10.5f}"
        lines.append(f"{step:<16}{means}{spreads[-1]:>10.5f}{gaps[-1]:>10.6f}")
    spread, gap = root_mean_square(spreads), root_mean_square(gaps)
    return [*lines, f"{'all steps':<16}{'':>20}{spread:>10.5f}{gap:>10.6f}   gap / spread = {gap / spread:.3f}"]


def root_mean_square(values: Sequence[float]) -> float:
    """Return the root of the mean of squares."""
    return statistics.mean(value**2 for value in values) ** 0.5


def main() -> None:
    """Train all students and print the tables."""
    parser = bench_parser(__doc__)
    parser.add_argument("--shards", type=Path, required=True, help="folder of a set")
    parser.add_argument("--held-out", type=Path, required=True, help="folder of another one of the same kind")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="a JSON file for all curves")
    arguments = parser.parse_args()
    config, every = load_config(arguments.config, arguments.set), max(arguments.steps // 10, 1)
    train_ = config.train.replace(max_steps=arguments.steps, log_every=every, held_out_every=every, trackers=())
    curves: dict[str, list[dict[str, Curve]]] = {"PEFT": [], "folded": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for name, found in curves.items():
                settings = train_.replace(seed=seed, fold_adapters=name == "folded")
                run = Path(folder) / f"{name}-{seed}"
                found.append(curves_of(config.replace(train=settings), arguments.shards, arguments.held_out, run))
                print(f"seed {seed}, {name}: last loss {list(found[-1]['loss'].values())[-1]:.5f}", flush=True)
    for loss in LOSSES:
        print("\n".join(table_of(loss, *([of[loss] for of in found] for found in curves.values()))))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(curves, indent=1))


if __name__ == "__main__":
    run_script(main)
