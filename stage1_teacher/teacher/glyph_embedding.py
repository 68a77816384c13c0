"""The embedding that stands for a line in the text caption: what it says, where, in what font and colour."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.anytext2.checkpoint import load_part
from stage1_teacher.teacher.font_crop import crop_along_line
from stage1_teacher.teacher.recognizer import NECK_CHANNELS, NUM_STEPS, Recognizer, normalize_line

POSITION_WIDTHS = (16, 32, 64, 128, 256)


class PositionEncoder(nn.Module):
    """A position mask to one vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, *_, last = POSITION_WIDTHS
        self.conv1 = nn.Conv2d(1, first, 3, padding=1)
        self.conv_list = nn.ModuleList(
            nn.Conv2d(source, target, 3, padding=1, stride=2) for source, target in pairwise(POSITION_WIDTHS)
        )
        self.conv2 = nn.Conv2d(last, width, 3, padding=1)

    def forward(self, positions: Tensor) -> Tensor:
        """(N, 1, H, W) to (N, c)."""
        x = functional.silu(self.conv1(positions))  # (N, 16, H, W)
        for convolution in self.conv_list:
            x = functional.silu(convolution(x))  # ... (N, 256, H / 16, W / 16)
        return functional.silu(self.conv2(x)).mean(dim=(2, 3))


def _projection(source: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(source, width), nn.LayerNorm(width))


class GlyphEmbedding(nn.Module):
    """Sums four encodings of each line; the recognizer that reads the glyphs is an argument, not a part."""

    def __init__(self, width: int) -> None:
        """Build with PyTorch's initial weights.

        Args:
            width: c, of CLIP's token embeddings.
        """
        super().__init__()
        features = NUM_STEPS * NECK_CHANNELS
        self.proj = _projection(features, width)
        self.position_encoder = PositionEncoder(width)
        self.font_predictor = Recognizer()
        self.style_proj = _projection(features, width)
        self.color_proj = _projection(3, width)

    def forward(self, glyph_features: Tensor, positions: Tensor, font_lines: Tensor, colors: Tensor) -> Tensor:
        """Embed N lines.

        Args:
            glyph_features: the recognizer's neck on the glyph lines, (N, 40, 64).
            positions: each line's mask, (N, 1, H, W).
            font_lines: from `font_lines`, (N, 3, 48, 320).
            colors: rgb from 0 to 255, or 500 for unknown, (N, 3).

        Returns:
            (N, c).
        """
        font_features = self.font_predictor.features(font_lines)  # (N, 40, 64)
        return self.combine(glyph_features, self.position_encoder(positions), font_features, colors)

    def combine(self, glyph_features: Tensor, where: Tensor, font_features: Tensor, colors: Tensor) -> Tensor:
        """Sum the encodings of N lines, where the frozen encoders' outputs are at hand.

        Args:
            glyph_features: the recognizer's neck on the glyph lines, (N, 40, 64).
            where: from the position encoder, (N, c).
            font_features: the font predictor's neck on the font lines, (N, 40, 64).
            colors: rgb from 0 to 255, or 500 for unknown, (N, 3).

        Returns:
            (N, c).
        """
        what = self.proj(glyph_features.flatten(1))  # (N, c)
        style = self.style_proj(font_features.flatten(1))
        embedding: Tensor = what + where + style + self.color_proj(colors)
        return embedding


load_glyph_embedding = partial(load_part, lambda config: GlyphEmbedding(config.context_dim), "embedding")


def glyph_lines(lines: Tensor) -> Tensor:
    """Prepare rendered lines, (N, 1, 80, 512) from 0 to 1, for the recognizer: (N, 3, 48, 320)."""
    return torch.stack([normalize_line(line * 255) for line in lines])


def font_lines(font_hint: Tensor, positions: Tensor) -> Tensor:
    """Prepare one sample's font hint for the font predictor, once per line.

    Args:
        font_hint: (1, H, W) from 0 to 1.
        positions: each line's mask, (N, 1, H, W).

    Returns:
        (N, 3, 48, 320).
    """
    return torch.stack([normalize_line(crop_along_line(font_hint * 255, mask[0])) for mask in positions])
