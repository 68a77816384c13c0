"""What bfloat16 leaves of a small adapter: with PEFT, folded into float32 weights, into weights rounded before.

    python bench/folded_rounding.py

One linear layer with an adapter, B of growing size, under autocast to bfloat16. Shown is how the layer's output
changes with the adapter, against the change in float64: how far it goes in the right direction (1 is right), and
its relative error.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from common.scripts import make_parser, run_script
from common.seeding import generator
from stage2_student.student.folding import FoldedAdapters
from stage2_student.student.lora import adapt, adapted_layers, lora_pair

SIZES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
WIDTH, RANK, ROWS = 640, 64, 256


def normal(name: str, *shape: int) -> Tensor:
    """Draw numbers that depend on the name alone."""
    return torch.randn(*shape, generator=generator(name))


class Layer(nn.Module):
    """A network of one layer."""

    def __init__(self, weight: Tensor) -> None:
        """Take over its weight."""
        super().__init__()
        self.layer = nn.Linear(*reversed(weight.shape), bias=False)
        self.layer.weight.data = weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        y: Tensor = self.layer(x)
        return y


@torch.no_grad()
def change_of(weight: Tensor, size: float, *, fold: bool) -> Tensor:
    """Return how the output changes, in float64, when B goes from zero to a size."""
    network, x = Layer(weight), normal("x", ROWS, WIDTH).bfloat16()
    adapt(network, "unet", {"layer": "layer"}, rank=RANK, alpha=RANK, seed=0)
    _, b = lora_pair(adapted_layers(network)["layer"])
    folded = None
    if fold:
        folded = FoldedAdapters([network], dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    outputs = []
    for value in (torch.zeros_like(b), size * normal("B", *b.shape)):
        b.copy_(value)
        if folded is not None:
            folded.refresh()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(network(x).double())
    return outputs[1] - outputs[0]


@torch.no_grad()
def exact_change(weight: Tensor, size: float) -> Tensor:
    """Return the same in float64 throughout."""
    network = Layer(weight.float())
    adapt(network, "unet", {"layer": "layer"}, rank=RANK, alpha=RANK, seed=0)
    a, b = lora_pair(adapted_layers(network)["layer"])
    b = size * normal("B", *b.shape)
    return normal("x", ROWS, WIDTH).bfloat16().double() @ a.double().T @ b.double().T


def main() -> None:
    """Print the table."""
    make_parser(__doc__).parse_args()
    weight = normal("W", WIDTH, WIDTH) / WIDTH**0.5
    rounded = weight.bfloat16()
    ways = {
        "PEFT": lambda size: change_of(rounded, size, fold=False),
        "folded, W in float32": lambda size: change_of(weight.clone(), size, fold=True),
        "folded, W rounded": lambda size: change_of(rounded.float(), size, fold=True),
    }
    print(f"{'size of B':<12}" + "".join(f"{name:>24}" for name in ways))
    for size in SIZES:
        exact, cells = exact_change(weight, size), []
        for way in ways.values():
            found = way(size)
            along, error = (found * exact).sum() / exact.square().sum(), (found - exact).norm() / exact.norm()
            cells.append(f"{float(along):>16.2f}{float(error):>8.2f}")
        print(f"{size:<12g}" + "".join(cells))


if __name__ == "__main__":
    run_script(main)
