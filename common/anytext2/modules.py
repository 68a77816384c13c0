"""AnyText2's additions to diffusers' networks: AttnX in the UNet, and the hint blocks of WriteNet.

This file needs torch and diffusers alone: `export --format diffusers-pipeline` puts it beside the weights as it
is, so that `from_pretrained` works where the rest of this project is not. Part of anytext2-distill, Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

STRIDED_CONVOLUTIONS = (4, 8, 12)
"""Places in a hint block that halve the size: all three for a VAE of stride 8, the first ones for a smaller."""


class AttnXBlock(BasicTransformerBlock):
    """A transformer block with a second pair of attentions, `attn1x` and `attn2x`, whose weight is an argument.

    diffusers builds these blocks; ours takes the place of one, parameters and names unchanged. All blocks of a
    UNet are replaced, with or without AttnX, because diffusers hands `attnx_scale` to every one of them.
    """

    def __init__(self, stock: BasicTransformerBlock, *, attnx: bool) -> None:
        """Take over a stock block's sizes; its parameters are not kept."""
        sizes: dict[str, Any] = {
            "dim": stock.dim,
            "num_attention_heads": stock.num_attention_heads,
            "attention_head_dim": stock.attention_head_dim,
        }
        super().__init__(**sizes, cross_attention_dim=stock.cross_attention_dim)
        self.attn1x: Attention | None = None
        self.attn2x: Attention | None = None
        if attnx:
            heads: dict[str, Any] = {"heads": stock.num_attention_heads, "dim_head": stock.attention_head_dim}
            self.attn1x = Attention(query_dim=stock.dim, **heads)
            self.attn2x = Attention(query_dim=stock.dim, cross_attention_dim=stock.cross_attention_dim, **heads)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Run the block on (B, h w, C) with a context of (B, L, c) and its bias of (B, 1, L)."""
        x, context = hidden_states, encoder_hidden_states
        x = x + self.attn1(self.norm1(x))  # (B, h w, C)
        x = x + self.attn2(self.norm2(x), context, encoder_attention_mask)
        if self.attn1x is not None and self.attn2x is not None:
            scale = (cross_attention_kwargs or {}).get("attnx_scale", 1.0)
            x = x + scale * self.attn1x(self.norm1(x))
            x = x + scale * self.attn2x(self.norm2(x), context, encoder_attention_mask)
        return x + self.ff(self.norm3(x))


class AnyText2UNet(UNet2DConditionModel):
    """diffusers' UNet with AttnX in some of its blocks; called as diffusers' is.

    `cross_attention_kwargs={"attnx_scale": s}` weighs AttnX, 1 if it is left out. WriteNet's residuals go in as
    `down_block_additional_residuals` (all but the last) and `mid_block_additional_residual` (the last).
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        down_block_types: Sequence[str] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types: Sequence[str] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        cross_attention_dim: int = 768,
        attention_head_dim: int = 8,
        attnx_mid: bool = True,
        attnx_down: bool = False,
        attnx_levels: Sequence[int] = (2, 1),
    ) -> None:
        """Build the UNet with PyTorch's initial weights; the defaults are the released model's.

        Args:
            in_channels: see `UNet2DConditionModel`, as for all but the last three.
            out_channels: ...
            down_block_types: ...
            up_block_types: ...
            block_out_channels: ...
            layers_per_block: ...
            norm_num_groups: ...
            cross_attention_dim: ...
            attention_head_dim: the number of heads: diffusers' misnomer.
            attnx_mid: AttnX in the middle block.
            attnx_down: AttnX in the blocks on the way down.
            attnx_levels: levels, 0 the shallowest, whose blocks on the way up have AttnX.
        """
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=tuple(down_block_types),
            up_block_types=tuple(up_block_types),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=attention_head_dim,
        )
        _replace_blocks(self.mid_block, attnx=attnx_mid)
        for block in self.down_blocks:
            _replace_blocks(block, attnx=attnx_down)
        for level, block in zip(reversed(range(len(up_block_types))), self.up_blocks, strict=True):
            _replace_blocks(block, attnx=level in attnx_levels)


def _replace_blocks(module: nn.Module | None, *, attnx: bool) -> None:
    for attention in getattr(module, "attentions", ()):
        blocks = attention.transformer_blocks
        for index, block in enumerate(blocks):
            blocks[index] = AttnXBlock(block, attnx=attnx)


def _hint_block(widths: Sequence[int], stride: int) -> nn.Sequential:
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

    def __init__(
        self, glyph_widths: Sequence[int], position_widths: Sequence[int], stride: int, channels: int, width: int
    ) -> None:
        """Build with PyTorch's initial weights.

        Args:
            glyph_widths: channels of the glyph block's four stages.
            position_widths: likewise.
            stride: pixels per latent cell.
            channels: of the latents.
            width: channels of WriteNet's first level.
        """
        super().__init__()
        self.glyph_block = _hint_block(glyph_widths, stride)
        self.position_block = _hint_block(position_widths, stride)
        self.fuse_block = nn.Conv2d(glyph_widths[-1] + position_widths[-1] + channels, width, 3, padding=1)

    def forward(self, hints: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return the hint, (B, width, h, w), of glyphs, positions (B, 1, H, W) and masked latents (B, C, h, w)."""
        glyphs, positions, masked_latents = hints
        encoded = [self.glyph_block(glyphs), self.position_block(positions), masked_latents]
        hint: Tensor = self.fuse_block(torch.cat(encoded, dim=1))
        return hint


class AnyText2WriteNet(ControlNetModel):
    """diffusers' ControlNet behind AnyText2's hint blocks, evaluated once per image: it sees neither z_t nor t."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 4,
        down_block_types: Sequence[str] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        cross_attention_dim: int = 768,
        attention_head_dim: int = 8,
        glyph_widths: Sequence[int] = (16, 32, 96, 256),
        position_widths: Sequence[int] = (8, 16, 32, 64),
        stride: int = 8,
    ) -> None:
        """Build WriteNet with PyTorch's initial weights, zero convolutions; the defaults are the released model's.

        Args:
            in_channels: see `ControlNetModel`, as for all but the last three.
            down_block_types: ...
            block_out_channels: ...
            layers_per_block: ...
            norm_num_groups: ...
            cross_attention_dim: ...
            attention_head_dim: the number of heads: diffusers' misnomer.
            glyph_widths: see `HintEncoder`.
            position_widths: see `HintEncoder`.
            stride: pixels per latent cell.
        """
        super().__init__(
            in_channels=in_channels,
            down_block_types=tuple(down_block_types),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=attention_head_dim,
        )
        self.controlnet_cond_embedding = HintEncoder(
            glyph_widths, position_widths, stride, in_channels, block_out_channels[0]
        )

    def forward(
        self, glyphs: Tensor, positions: Tensor, masked_latents: Tensor, text_context: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute the residuals of a batch.

        Args:
            glyphs: union of the rendered lines, (B, 1, H, W), 0 or 1.
            positions: sum of the lines' position masks, (B, 1, H, W).
            masked_latents: VAE latents of the masked image, (B, C, h, w).
            text_context: encodings of the text captions, (B, 77, c).

        Returns:
            One residual per skip connection of the UNet, shallow to deep, then the middle block's: 13 tensors
            in the released model.
        """
        latents = torch.zeros_like(masked_latents)  # (B, C, h, w)
        timesteps = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
        hints = (glyphs, positions, masked_latents)
        down, middle = super().forward(latents, timesteps, text_context, hints, return_dict=False)
        return (*down, middle)
