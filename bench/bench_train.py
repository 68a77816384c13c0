"""Training steps from shards, against one batch held in memory, and against running the teacher online.

    python bench/bench_train.py

All in this process, in turn, with the same student, batch size and optimizer. A step from shards
reads, checks and decodes its records. The online step does what diffusers' LCM-LoRA script does: it encodes
images (VAE), captions (CLIP) and lines (OCR), calls the teacher twice and the target once besides the
student; the rendering of its inputs is not counted. Aims: at least 0.95 of the rate in memory, at least 2 times
the online rate.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.gpu.learning import online_step, ours
from bench.inputs import bench_parser, finish, read_config, render_inputs
from common.scripts import run_script
from shards.reading.reader import ShardSet
from stage1_teacher.precompute import precompute
from stage1_teacher.teacher.teacher import Teacher
from stage1_teacher.tiny.data import write_dataset
from stage2_student.train import make_accelerator
from stage2_student.training.ancestry import Ancestry
from stage2_student.training.prepare import make_loader, prepare
from stage2_student.training.trainer import Trainer

Step = Callable[[], None]


def endless(batches: Iterator[object], trainer: Trainer) -> Step:
    """Return the trainer's own step on batches."""
    return lambda: [trainer.optimizer_step(batches), None][1]  # type: ignore[arg-type, func-returns-value]


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Time the steps in turn, so that all meet the same weather; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            before = time.perf_counter()
            step()
            finish()
            if number:
                seconds[name].append(time.perf_counter() - before)
    return seconds


def report_memory(who: str, step: Step) -> None:
    """Print the most GPU memory that is allocated during a step, not the first one; nothing without a GPU."""
    if torch.cuda.is_available():
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        print(f"{who}: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory", flush=True)


def main() -> None:
    """Print the table."""
    parser = bench_parser(__doc__)
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = read_config(arguments.config, arguments.set)
        few_steps = config.precompute.replace(solver_steps=8, record_every=2)  # records look as after 40 steps
        endless_run = config.train.replace(max_steps=10**6, log_every=10**6)
        config = config.replace(precompute=few_steps, train=endless_run)
        annotations = write_dataset(folder / "data", count=arguments.records, seed=1, size=config.inputs.size)
        precompute(config, folder / "shards", annotations=[annotations])
        dataset = ShardSet.open(folder / "shards")
        accelerator = make_accelerator(config)
        trainer, _ = prepare(config, accelerator, dataset, folder / "run", None, Ancestry())
        loader = make_loader(config.replace(train=config.train.replace(num_workers=1)), accelerator, dataset)
        batch = next(iter(trainer.loader))
        from_memory = endless(itertools.repeat(batch), trainer)
        report_memory("student alone", from_memory)
        rendered = render_inputs(config, annotations, config.train.batch_size)
        scale = config.precompute.guidance_scale
        steps = {
            "one batch in memory": from_memory,
            "from shards": endless(iter(trainer.loader), trainer),
            "from shards, 1 worker": endless(iter(loader), trainer),
            "teacher online": online_step(ours(trainer), Teacher.load(config), rendered, scale, together=True),
        }
        report_memory("teacher online", steps["teacher online"])
        seconds = measure(steps, arguments.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    size = config.train.batch_size
    print(
        f"batch of {size}, {torch.get_num_threads()} threads on {accelerator.device}, median of {arguments.rounds}"
    )
    print(f"{'step':<24}{'ms a step':>10}{'samples/s':>11}{'rate, of in memory':>20}{'rate, of online':>17}")
    for name, median in medians.items():
        memory, online = medians["one batch in memory"] / median, medians["teacher online"] / median
        print(f"{name:<24}{1000 * median:>10.1f}{size / median:>11.1f}{memory:>20.2f}{online:>17.2f}")


if __name__ == "__main__":
    run_script(main)
