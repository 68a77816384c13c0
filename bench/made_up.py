"""Write a checkpoint of a configuration's network with made-up weights: they do not change how long a step takes.

    python bench/made_up.py --config configs/sd15.toml --out build/made_up.safetensors

For the full-size network float16 weights take 3 GB. What comes out of it is noise, of a size that stays finite.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from common.anytext2.checkpoint import schedule_buffers, write_checkpoint
from common.config import PROJECT_ROOT, load_config
from common.scripts import make_parser, run_script
from stage1_teacher.teacher.keys import teacher_shapes

LAST_LAYER = "model.diffusion_model.out.2.weight"
"""Made small, so that a solve from noise with guidance stays within float16."""


def make_up(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Draw float16 weights from which activations keep their size; norms scale by 1 and more."""
    generator = torch.Generator().manual_seed(0)
    tensors = schedule_buffers()
    for key, shape in shapes.items():
        if key not in tensors:
            fan_in = max(1, torch.Size(shape[1:]).numel())
            values = torch.randn(shape, generator=generator) / fan_in**0.5
            is_scale = len(shape) <= 1 and (key.endswith("weight") or "running_var" in key)
            tensors[key] = (values.abs() + 1 if is_scale else values).half()
    tensors[LAST_LAYER] *= 0.01
    return tensors


def main() -> None:
    """Parse the command line and write the file."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", type=Path, default=PROJECT_ROOT / "configs" / "sd15.toml")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    arguments = parser.parse_args()
    network = load_config(arguments.config).load_network()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(arguments.out, make_up(teacher_shapes(network)))
    print(arguments.out)


if __name__ == "__main__":
    run_script(main)
