"""Where an image holds text, on the grid of its latents."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def text_cells(positions: Tensor, size: tuple[int, int]) -> Tensor:
    """Mark the latent cells that hold text: those that any pixel of a line's position mask falls into.

    Args:
        positions: the lines' summed position masks, (B, 1, H, W) of any type, 0 outside text.
        size: (h, w) of the latents.

    Returns:
        (B, 1, h, w) float32, 1 in cells with text and 0 elsewhere.
    """
    return functional.adaptive_max_pool2d((positions > 0).float(), size)
