"""Stage one's UNet evaluations per second against a bare loop of batched UNet calls.

    python bench/bench_precompute.py

Both run in this process, in turn, at the same batch size: a whole `precompute` (rendering, encoding, WriteNet,
the solve, rounding, writing and verifying the shard) and a loop that does nothing but call the UNet on batches of
conditional and unconditional rows. An evaluation is one row through the UNet. Aim: at least 0.9. (On a GPU, which
works on while Python goes on, the share in the UNet says nothing.)
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.inputs import bench_parser, finish, read_config, render_inputs
from common.anytext2.denoiser import Denoiser, predict_branches
from common.config import Config
from common.scripts import run_script
from stage1_teacher.precompute import precompute
from stage1_teacher.teacher.teacher import Teacher
from stage1_teacher.tiny.data import write_dataset


def time_precompute(config: Config, annotations: Path) -> tuple[float, float, float]:
    """Run precompute; return the seconds with and without its UNet calls, and the rows it evaluated.

    The teacher's loading is not counted: it happens once in a run of days.
    """
    rows, inside, loading = 0, 0.0, 0.0
    forward, load = Denoiser.forward, Teacher.load

    def counted_forward(self, noisy_latents, *args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal rows, inside
        started = time.perf_counter()
        result = forward(self, noisy_latents, *args, **kwargs)
        inside += time.perf_counter() - started
        rows += len(noisy_latents)
        return result

    def counted_load(*args):  # type: ignore[no-untyped-def]
        nonlocal loading
        started = time.perf_counter()
        teacher = load(*args)
        loading += time.perf_counter() - started
        return teacher

    Denoiser.forward, Teacher.load = counted_forward, staticmethod(counted_load)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            precompute(config, Path(folder), annotations=[annotations])
            seconds = time.perf_counter() - started - loading
    finally:
        Denoiser.forward, Teacher.load = forward, load  # type: ignore[method-assign]
    return seconds, inside, rows


def time_bare_loop(config: Config, annotations: Path, teacher: Teacher) -> float:
    """Return the rows per second of UNet calls alone, at the same batch and the same number of steps."""
    rendered = render_inputs(config, annotations, config.precompute.batch_size)
    with torch.no_grad():
        predict = predict_branches(teacher.denoiser, teacher.encode(rendered), teacher.unconditional())
        z = torch.randn(len(rendered), *teacher.network.latent_shape(config.inputs.size)).to(teacher.device)
        t = torch.full((len(rendered),), 500, device=teacher.device)
        predict(z, t)  # warm up
        finish()
        started = time.perf_counter()
        for _ in range(config.precompute.solver_steps):
            predict(z, t)
        finish()
    return 2 * len(rendered) * config.precompute.solver_steps / (time.perf_counter() - started)


def main() -> None:
    """Print the table."""
    parser = bench_parser(__doc__)
    parser.add_argument("--inputs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config = read_config(arguments.config, arguments.set)
    ratios, shares = [], []
    print(f"{'round':<7}{'precompute, rows/s':>20}{'bare loop, rows/s':>20}{'ratio':>8}{'share in UNet':>15}")
    with tempfile.TemporaryDirectory() as folder:
        annotations = write_dataset(Path(folder), count=arguments.inputs, seed=1, size=config.inputs.size)
        if torch.cuda.is_available():
            time_precompute(config, annotations)
            print(f"stage one: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory", flush=True)
        teacher = Teacher.load(config)
        for number in range(arguments.rounds):
            before = time_bare_loop(config, annotations, teacher)
            seconds, inside, rows = time_precompute(config, annotations)
            bare = (before + time_bare_loop(config, annotations, teacher)) / 2
            ratios.append(rows / seconds / bare)
            shares.append(inside / seconds)
            print(
                f"{number:<7}{rows / seconds:>20.1f}{bare:>20.1f}{ratios[-1]:>8.2f}{shares[-1]:>15.2f}", flush=True
            )
    print(f"{'median':<47}{statistics.median(ratios):>8.2f}{statistics.median(shares):>15.2f}")


if __name__ == "__main__":
    run_script(main)
