"""What WriteNet sees of a layout, besides the text context."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from common.tensors import Tensors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hints(Tensors):
    """Glyphs, positions and masked latents of a batch, all of one float type and device."""

    glyphs: Tensor
    """Union of the rendered lines, (B, 1, H, W), 0 or 1."""
    positions: Tensor
    """Sum of the lines' position masks, (B, 1, H, W): 0, 1, 2 ..."""
    masked_latents: Tensor
    """VAE latents of the masked image, (B, C, h, w)."""

    def __len__(self) -> int:
        return int(self.masked_latents.shape[0])
