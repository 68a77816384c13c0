"""Teach the position encoder where a line stands, on boxes alone; the denoiser's training then takes it as given.

    python -m stage1_teacher.tiny.train_position --out runs/tiny/position.pt

The encoder averages over the picture, so from a random start it hardly knows where a mask is. Its target is a row
of bumps over the centre's y and x and over the box's height and width, which attention can compare with.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from common.files import atomic_write
from common.scripts import make_parser, run_script, start_training
from common.seeding import generator
from stage1_teacher.teacher.glyph_embedding import PositionEncoder
from stage1_teacher.tiny.train_vae import learning_rate

log = logging.getLogger(__name__)


def draw_boxes(count: int, size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Draw upright boxes of a line's proportions.

    Returns:
        Masks (count, 1, size, size) and boxes (count, 4): centre y and x, height, width, as shares of the size.
    """
    g = generator("position boxes", seed, step)
    height = 0.15 + 0.3 * torch.rand(count, generator=g)
    width = torch.maximum(height, 0.15 + 0.83 * torch.rand(count, generator=g))
    y = height / 2 + (1 - height) * torch.rand(count, generator=g)
    x = width / 2 + (1 - width) * torch.rand(count, generator=g)
    at = (torch.arange(size) + 0.5) / size
    rows = (at - y[:, None]).abs() <= height[:, None] / 2  # (count, size)
    columns = (at - x[:, None]).abs() <= width[:, None] / 2
    masks = (rows[:, :, None] & columns[:, None, :]).float()[:, None]
    return masks, torch.stack([y, x, height, width], dim=1)


def bumps(boxes: Tensor, width: int) -> Tensor:
    """Encode boxes (N, 4) as (N, width) bumps: three eighths for y, three for x, one each for height and width."""
    counts = (3 * width // 8, 3 * width // 8, width // 8, width // 8)
    parts = []
    for value, count in zip(boxes.unbind(1), counts, strict=True):
        centers = torch.linspace(0, 1, count)
        spread = 1.5 / count
        parts.append(torch.exp(-0.5 * ((value[:, None] - centers) / spread) ** 2))
    return 1.5 * torch.cat(parts, dim=1)


def build(width: int, seed: int) -> PositionEncoder:
    """Build the encoder with weights that keep the signal's size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = PositionEncoder(width)
        for part in encoder.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)
                if part.bias is not None:
                    nn.init.normal_(part.bias, std=0.1)
    return encoder


def main() -> None:
    """Parse the command line and train."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    start_training(options.threads)
    encoder = build(options.width, options.seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), weight_decay=0.0)
    total = 0.0
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, 1e-3)
        masks, boxes = draw_boxes(options.batch_size, options.size, options.seed, step)
        loss = (encoder(masks) - bumps(boxes, options.width)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        total += float(loss.detach())
        if (step + 1) % 25 == 0:
            log.info("step %d loss %.4f", step + 1, total / 25)
            total = 0.0
            with atomic_write(options.out) as file:
                torch.save(encoder.state_dict(), file)


if __name__ == "__main__":
    run_script(main)
