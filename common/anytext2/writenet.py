"""WriteNet of a configuration: diffusers' ControlNet behind AnyText2's hint blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from common.anytext2.conditioning import Hints
from common.anytext2.config import NetworkConfig
from common.anytext2.modules import AnyText2WriteNet
from common.anytext2.unet import Control, trunk_sizes


def writenet_sizes(config: NetworkConfig) -> dict[str, Any]:
    """Return the arguments of `AnyText2WriteNet`."""
    return {
        **trunk_sizes(config),
        "glyph_widths": config.writenet.glyph_widths,
        "position_widths": config.writenet.position_widths,
        "stride": config.stride,
    }


class WriteNet(AnyText2WriteNet):
    """Turns a layout and its text into the UNet's residuals; a pure function of its arguments.

    It sees neither z_t nor t (upstream's `fast_control`): its latents and timestep are zero.
    """

    def __init__(self, config: NetworkConfig) -> None:
        """Build WriteNet with PyTorch's initial weights and zero convolutions."""
        super().__init__(**writenet_sizes(config))

    def forward(self, hints: Hints, text_context: Tensor) -> Control:  # type: ignore[override]
        """Compute the residuals of a batch.

        Args:
            hints: of B samples.
            text_context: encodings of the text captions, (B, 77, c).

        Returns:
            One residual per skip connection of the UNet, shallow to deep, then the middle block's: 13 tensors
            in the released model.
        """
        return super().forward(hints.glyphs, hints.positions, hints.masked_latents, text_context)
