"""What WriteNet sees of a layout, besides the text context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """Glyphs, positions and masked latents of a batch, all of one float type and device."""

    glyphs: Tensor
    """Union of the rendered lines, (B, 1, H, W), 0 or 1."""
    positions: Tensor
    """Sum of the lines' position masks, (B, 1, H, W): 0, 1, 2 ..."""
    masked_latents: Tensor
    """VAE latents of the masked image, (B, C, h, w)."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Hints:
        """Return the hints on a device, in a float type."""
        return Hints(
            glyphs=self.glyphs.to(device=device, dtype=dtype),
            positions=self.positions.to(device=device, dtype=dtype),
            masked_latents=self.masked_latents.to(device=device, dtype=dtype),
        )

    def pin_memory(self) -> Hints:
        """Copy to page-locked memory."""
        return Hints(
            glyphs=self.glyphs.pin_memory(),
            positions=self.positions.pin_memory(),
            masked_latents=self.masked_latents.pin_memory(),
        )

    def __len__(self) -> int:
        return int(self.masked_latents.shape[0])

    def __getitem__(self, index: slice | Tensor) -> Hints:
        """Return part of the batch."""
        return Hints(
            glyphs=self.glyphs[index],
            positions=self.positions[index],
            masked_latents=self.masked_latents[index],
        )
