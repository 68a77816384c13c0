"""Where along its solve a teacher loses letters: what it takes x0 to be at each timestep, read by OCR.

    python -m stage1_teacher.tiny.data --count 200 --seed 4 --out build/tune
    python bench/solve_profile.py --annotations build/tune/data.json --count 60

Of each timestep of the grid: lines read exactly in x0 as predicted there, decoded; that x0's error (root mean
square) against the true image's latents, inside of the lines' boxes and outside; and the same for predictions from
true latents with that timestep's noise, where nothing before can have gone wrong. Nothing is edited. For layouts
that are not the held-out ones: these are for `pipeline.py evaluate`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.inputs import bench_parser
from common.anytext2.denoiser import guide, predict_branches
from common.config import load_config
from common.ddim import Predict, integrate, parse_grid
from common.progress import Progress
from common.schedule import diffuse, make_alphas_cumprod, predict_x0
from common.scripts import run_script
from common.seeding import generator
from stage1_teacher.inputs.files import open_inputs
from stage1_teacher.measuring.held_out import HeldOut
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.teacher import Teacher
from stage2_student.evaluation.judges import load_judge
from stage2_student.evaluation.reading import read_images
from stage2_student.student.sample import decode


def keep_x0(predict: Predict, kept: list[Tensor]) -> Predict:
    """Make a predictor that also keeps x0 as it predicts it, (B, C, h, w) each call."""

    def predict_and_keep(z: Tensor, timesteps: Tensor) -> Tensor:
        eps = predict(z, timesteps)
        kept.append(predict_x0(z, eps, make_alphas_cumprod()[int(timesteps[0])].to(z.device)))
        return eps

    return predict_and_keep


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = bench_parser(__doc__)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60, help="layouts")
    parser.add_argument("--grid", default="upstream:20")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    options = parse_options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_config(options.config, [*options.set, "inputs.edit_fraction=0"])
    settings = RenderSettings.from_config(config)
    held = HeldOut(open_inputs([options.annotations], [], config.inputs, settings.fonts), settings, options.count)
    layouts = held.layouts
    teacher = Teacher.load(config)
    scale, grid = config.precompute.guidance_scale, parse_grid(options.grid)
    uncond = teacher.unconditional() if scale != 1 else None
    on_the_way, from_truth = list[Tensor](), list[Tensor]()  # per batch: (N, B, C, h, w)
    truths, boxes = [], []
    ids = [layout.layout_id for layout in layouts]
    with torch.no_grad(), Progress(len(ids), "solving", "layout") as progress:
        for start in range(0, len(ids), options.batch):
            chunk = ids[start : start + options.batch]
            conditionings = held.encode(teacher, chunk)
            predict = guide(predict_branches(teacher.denoiser, conditionings, uncond), scale)
            true = held.reconstruct(teacher, chunk)
            noises = [
                torch.randn(true.shape[1:], generator=generator("profile", options.seed, name)) for name in chunk
            ]
            noise = torch.stack(noises).to(true.device)
            solved, single = list[Tensor](), list[Tensor]()
            integrate(keep_x0(predict, solved), noise, grid)
            for t in grid.timesteps:
                noisy = diffuse(true, noise, make_alphas_cumprod()[t].to(true.device))
                keep_x0(predict, single)(noisy, torch.full((len(chunk),), int(t), device=true.device))
            on_the_way.append(torch.stack(solved))
            from_truth.append(torch.stack(single))
            positions = torch.stack([item.positions for item in conditionings]).to(true.device)
            truths.append(true)
            boxes.append(functional.max_pool2d(positions.float(), teacher.network.stride) > 0)
            progress.update(len(chunk))
    true, inside = torch.cat(truths), torch.cat(boxes)
    recognizer = load_judge(config.evaluate.judge)

    def measure(x0: Tensor) -> str:
        results = read_images(recognizer, decode(teacher.vae, x0), layouts)
        exact = np.mean([line.exact for lines in results for line in lines])
        error, mask = x0 - true, inside.expand_as(true)
        inside_of, outside = (float(error[where].square().mean().sqrt()) for where in (mask, ~mask))
        return f"{exact:.3f} | {inside_of:.3f} | {outside:.3f}"

    print(f"{sum(len(layout.lines) for layout in layouts)} lines of {len(layouts)} layouts, {options.grid}")
    print("| t | read | error in boxes | elsewhere | from true latents: read | error in boxes | elsewhere |")
    print("| --- " * 7 + "|")
    for t, way, single_step in zip(
        grid.timesteps, torch.cat(on_the_way, 1), torch.cat(from_truth, 1), strict=True
    ):
        print(f"| {int(t)} | {measure(way)} | {measure(single_step)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
