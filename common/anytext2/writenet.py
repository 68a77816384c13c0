"""WriteNet: diffusers' ControlNet behind AnyText2's hint blocks, evaluated once per image and condition."""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from common.anytext2.conditioning import Hints
from common.anytext2.config import NetworkConfig
from common.anytext2.unet import Control, trunk_sizes

STRIDED_CONVOLUTIONS = (4, 8, 12)
"""Places in a hint block that halve the size: all three for a VAE of stride 8, the first ones for a smaller."""


def _hint_block(widths: tuple[int, ...], stride: int) -> nn.Sequential:
    """Build 1 -> w0 -> w0 -> w1 -> w1 -> w2 -> w2 -> w3, 3x3 convolutions with SiLU between and after."""
    layers: list[nn.Module] = []
    channels = [1, widths[0]] + [width for pair in pairwise(widths) for width in pair]
    strided = STRIDED_CONVOLUTIONS[: stride.bit_length() - 1]
    for source, target in pairwise(channels):
        step = 2 if len(layers) in strided else 1
        layers += [nn.Conv2d(source, target, 3, padding=1, stride=step), nn.SiLU()]
    return nn.Sequential(*layers)


class HintEncoder(nn.Module):
    """Fuses glyphs, positions and masked latents into what is added after WriteNet's first convolution."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        glyph, position = config.writenet.glyph_widths, config.writenet.position_widths
        self.glyph_block = _hint_block(glyph, config.stride)
        self.position_block = _hint_block(position, config.stride)
        fused = glyph[-1] + position[-1] + config.latent_channels
        self.fuse_block = nn.Conv2d(fused, config.unet.model_channels, 3, padding=1)

    def forward(self, hints: Hints) -> Tensor:
        """Return the hint, (B, model_channels, h, w)."""
        glyphs = self.glyph_block(hints.glyphs)  # (B, 256, h, w)
        positions = self.position_block(hints.positions)  # (B, 64, h, w)
        hint: Tensor = self.fuse_block(torch.cat([glyphs, positions, hints.masked_latents], dim=1))
        return hint


class WriteNet(ControlNetModel):
    """Turns a layout and its text into the UNet's residuals; a pure function of its arguments.

    It sees neither z_t nor t (upstream's `fast_control`): its latents and timestep are zero.
    """

    def __init__(self, config: NetworkConfig) -> None:
        """Build WriteNet with PyTorch's initial weights and zero convolutions."""
        super().__init__(**trunk_sizes(config))
        self.controlnet_cond_embedding = HintEncoder(config)

    def forward(self, hints: Hints, text_context: Tensor) -> Control:
        """Compute the residuals of a batch.

        Args:
            hints: of B samples.
            text_context: encodings of the text captions, (B, 77, c).

        Returns:
            One residual per skip connection of the UNet, shallow to deep, then the middle block's: 13 tensors
            in the released model.
        """
        latents = torch.zeros_like(hints.masked_latents)  # (B, C, h, w)
        timesteps = torch.zeros(len(hints), dtype=torch.int64, device=latents.device)
        down, middle = super().forward(latents, timesteps, text_context, hints, return_dict=False)
        return (*down, middle)
