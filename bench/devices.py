"""How far a device and a number format take the networks from float32 on the CPU.

    python bench/devices.py

The networks get what the CPU computed before them, so that an error shows where it arises; only the text's context
has the recognizer's error in it, and the UNet's row WriteNet's. Printed are norm(difference) / norm(CPU's); for
CUDA in float32 with and without TF32, which PyTorch by default takes for convolutions.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.inputs import bench_parser, read_config, render_inputs
from common.anytext2.conditioning import ConditioningBatch
from common.config import Config
from common.schedule import diffuse
from common.scripts import run_script
from stage1_teacher.rendering.rendered_input import RenderedInput
from stage1_teacher.teacher.teacher import Teacher
from stage1_teacher.tiny.data import write_dataset

TIMESTEP = 500


def load(config: Config, device: str, dtype: str) -> Teacher:
    """Load the teacher to a device."""
    return Teacher.load(config.replace(model=config.model.replace(device=device, dtype=dtype)))


def draw(config: Config) -> RenderedInput:
    """Draw one input with its image."""
    with tempfile.TemporaryDirectory() as folder:
        annotations = write_dataset(Path(folder), count=1, seed=1, size=config.inputs.size)
        return render_inputs(config, annotations, 1)[0]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in convolutions and matrix products."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@torch.no_grad()
def compute(teacher: Teacher, rendered: RenderedInput, reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the networks one by one, each on what the CPU computed before it.

    Args:
        teacher: the networks.
        rendered: one input with its image.
        reference: what this returned for the CPU; empty to compute it.

    Returns:
        Outputs by the network's name, float32 on the CPU.
    """
    assert rendered.image is not None
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> Tensor:
        """Keep an output; return what to go on with."""
        found[name] = value.float().cpu()
        return reference.get(name, found[name])

    own = teacher.encode([rendered])[0]
    given = replace(
        own,
        image_context=keep("caption's context", own.image_context),
        text_context=keep("text's context", own.text_context),
        masked_latents=keep("VAE encoder, masked image", own.masked_latents),
    )
    latents = keep(
        "VAE encoder, image", teacher.vae.encode(rendered.image[None].to(teacher.device, teacher.dtype))
    )
    batch = ConditioningBatch.stack([given.to(teacher.device, teacher.dtype)])
    control = teacher.denoiser.control(batch)
    keep("WriteNet's first residual", control[0])
    keep("WriteNet's last residual", control[-1])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = diffuse(latents, noise, torch.tensor(0.25)).to(teacher.device)
    timestep = torch.tensor([TIMESTEP], device=teacher.device)
    keep("UNet, with WriteNet", teacher.denoiser(noisy, timestep, batch, control))
    keep("VAE decoder", teacher.decode(latents))
    return found


def main() -> None:
    """Print the table."""
    arguments = bench_parser(__doc__).parse_args()
    config = read_config(arguments.config, arguments.set)
    rendered = draw(config)
    reference = compute(load(config, "cpu", "float32"), rendered, {})
    cases = [("cpu", "bfloat16", False)]
    if torch.cuda.is_available():
        cases = [("cuda", "float32", False), ("cuda", "float32", True)]
        cases += [("cuda", "bfloat16", False), ("cuda", "float16", False)]
    columns = {}
    for device, dtype, allowed in cases:
        with tf32(allowed):
            outputs = compute(load(config, device, dtype), rendered, reference)
        name = f"{device} {dtype}" + (" TF32" if allowed else "")
        columns[name] = {
            key: float((value - reference[key]).norm() / reference[key].norm()) for key, value in outputs.items()
        }
    print("| network | " + " | ".join(columns) + " |")
    print("| --- " * (len(columns) + 1) + "|")
    for key in reference:
        print(f"| {key} | " + " | ".join(f"{column[key]:.1e}" for column in columns.values()) + " |")


if __name__ == "__main__":
    run_script(main)
