"""PP-OCRv3's text recognizer: the encoder of glyph lines, and in a second copy that of font hints.

MobileNetV1Enhance (scale 0.5), a SVTR neck, and a CTC head over 6,625 classes, for lines of 48 x 320 pixels.
Sources: PP-OCRv3 (Li et al. 2022, arXiv 2206.03001), SVTR (Du et al. 2022, arXiv 2205.00159).
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.anytext2.checkpoint import load_part

LINE_HEIGHT, LINE_WIDTH = 48, 320
"""Pixels of the lines that the recognizer reads."""
NUM_STEPS, NECK_CHANNELS, NUM_CLASSES = 40, 64, 6625
"""Steps along a line, features of a step, and classes (blank, 6,623 characters, space)."""
NECK_HIDDEN, NECK_HEADS, NECK_DEPTH = 120, 8, 2

BACKBONE = (
    # channels in, out, kernel, stride (height, width), squeeze-and-excitation
    (16, 32, 3, (1, 1), False),
    (32, 64, 3, (1, 1), False),
    (64, 64, 3, (1, 1), False),
    (64, 128, 3, (2, 1), False),
    (128, 128, 3, (1, 1), False),
    (128, 256, 3, (2, 1), False),
    (256, 256, 5, (1, 1), False),
    (256, 256, 5, (1, 1), False),
    (256, 256, 5, (1, 1), False),
    (256, 256, 5, (1, 1), False),
    (256, 256, 5, (1, 1), False),
    (256, 512, 5, (2, 1), True),
    (512, 512, 5, (1, 2), True),
)


class Reading(NamedTuple):
    """What the recognizer makes of N lines."""

    logits: Tensor
    """(N, 40, 6625)."""
    neck: Tensor
    """Features before the head, (N, 40, 64)."""


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm, and an activation."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        activation: nn.Module,
        *,
        stride: int | tuple[int, int] = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.norm: nn.Module = nn.BatchNorm2d(channels_out)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        y: Tensor = self.activation(self.norm(self.conv(x)))
        return y

    def fold(self) -> None:
        """Put the norm into the convolution, in place: W' = s W, b' = b - s m with s = g / sqrt(v + eps).

        Computed in float64. Source: Jacob et al. 2018 (arXiv 1712.05877), section 3.2.
        """
        norm = self.norm
        if not isinstance(norm, nn.BatchNorm2d):
            return
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()  # (C',)
        shift = norm.bias.double() - norm.running_mean.double() * scale
        weight = self.conv.weight
        self.conv.weight = nn.Parameter((weight.double() * scale[:, None, None, None]).to(weight), False)
        self.conv.bias = nn.Parameter(shift.to(weight), False)
        self.norm = nn.Identity()


class Gate(nn.Module):
    """Squeeze-and-excitation: channels weighed by what the whole image shows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels // 4, 1)
        self.conv2 = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        pooled = x.mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
        return x * functional.hardsigmoid(self.conv2(functional.relu(self.conv1(pooled))))


class SeparableBlock(nn.Module):
    """Depthwise, perhaps a gate, pointwise."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: tuple[int, int], gated: bool
    ) -> None:
        super().__init__()
        self.depthwise = ConvNorm(
            channels_in, channels_in, kernel, nn.Hardswish(), stride=stride, groups=channels_in
        )
        self.gate: nn.Module = Gate(channels_in) if gated else nn.Identity()
        self.pointwise = ConvNorm(channels_in, channels_out, 1, nn.Hardswish())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        y: Tensor = self.pointwise(self.gate(self.depthwise(x)))
        return y


class Backbone(nn.Module):
    """MobileNetV1Enhance: an image to one row of features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 16, 3, nn.Hardswish(), stride=2)
        self.blocks = nn.Sequential(*(SeparableBlock(*sizes) for sizes in BACKBONE))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 48, 320) to (N, 512, 1, 40)."""
        return functional.avg_pool2d(self.blocks(self.stem(x)), 2)


class Mixer(nn.Module):
    """Self-attention over a line's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(NECK_HIDDEN, 3 * NECK_HIDDEN)
        self.proj = nn.Linear(NECK_HIDDEN, NECK_HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 120) to the same shape."""
        q, k, v = self.qkv(x).unflatten(2, (3, NECK_HEADS, -1)).permute(2, 0, 3, 1, 4)  # each (N, heads, T, 15)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return y


class Mlp(nn.Module):
    """The transformer block's feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(NECK_HIDDEN, 2 * NECK_HIDDEN)
        self.fc2 = nn.Linear(2 * NECK_HIDDEN, NECK_HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 120) to the same shape."""
        y: Tensor = self.fc2(functional.silu(self.fc1(x)))
        return y


class MixerBlock(nn.Module):
    """SVTR's global mixing block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(NECK_HIDDEN)
        self.mixer = Mixer()
        self.norm2 = nn.LayerNorm(NECK_HIDDEN)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 120) to the same shape."""
        x = x + self.mixer(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class Neck(nn.Module):
    """SVTR's encoder: mixing blocks between convolutions, with a shortcut around them."""

    def __init__(self) -> None:
        super().__init__()
        width = BACKBONE[-1][1]
        self.conv1 = ConvNorm(width, width // 8, 3, nn.SiLU())
        self.conv2 = ConvNorm(width // 8, NECK_HIDDEN, 1, nn.SiLU())
        self.blocks = nn.Sequential(*(MixerBlock() for _ in range(NECK_DEPTH)))
        self.norm = nn.LayerNorm(NECK_HIDDEN, eps=1e-6)
        self.conv3 = ConvNorm(NECK_HIDDEN, width, 1, nn.SiLU())
        self.conv4 = ConvNorm(2 * width, width // 8, 3, nn.SiLU())
        self.conv1x1 = ConvNorm(width // 8, NECK_CHANNELS, 1, nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        """(N, 512, 1, T) to (N, T, 64)."""
        y = self.conv2(self.conv1(x))  # (N, 120, 1, T)
        steps = self.norm(self.blocks(y.flatten(2).transpose(1, 2)))  # (N, T, 120)
        y = self.conv3(steps.transpose(1, 2).unsqueeze(2))  # (N, 512, 1, T)
        y = self.conv1x1(self.conv4(torch.cat([x, y], dim=1)))  # (N, 64, 1, T)
        return y.flatten(2).transpose(1, 2)


class Recognizer(nn.Module):
    """Reads lines; a pure function. Only ever used in eval mode: batch norm does not track anything."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.neck = Neck()
        self.head = nn.Linear(NECK_CHANNELS, NUM_CLASSES)

    def fold_norms(self) -> None:
        """Fold every batch norm into its convolution, in place: fewer kernels, the same values up to rounding."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()

    def features(self, lines: Tensor) -> Tensor:
        """Return the neck's features, (N, 40, 64), of normalised lines (N, 3, 48, 320)."""
        neck: Tensor = self.neck(self.backbone(lines))
        return neck

    def forward(self, lines: Tensor) -> Reading:
        """Read lines (N, 3, 48, 320) from `normalize_line`."""
        neck = self.features(lines)
        return Reading(logits=self.head(neck), neck=neck)


load_recognizer = partial(load_part, lambda _config: Recognizer(), "recognizer")


def normalize_line(image: Tensor) -> Tensor:
    """Fit an image of a line into the recognizer's frame.

    Args:
        image: (1 or 3, h, w), 0 to 255. One much higher than wide is taken for vertical text and turned left.

    Returns:
        (3, 48, 320): scaled to 48 pixels of height (and squeezed to 320 of width if it is longer), mapped to
        [-1, 1], zeros to the right.
    """
    if image.shape[1] > 1.2 * image.shape[2]:
        image = image.transpose(1, 2).flip(1)
    height, width = image.shape[1:]
    target = min(LINE_WIDTH, math.ceil(LINE_HEIGHT * (width / height)))
    resized = functional.interpolate(
        image[None], size=(LINE_HEIGHT, target), mode="bilinear", align_corners=True
    )  # (1, c, 48, target)
    scaled = resized[0].expand(3, -1, -1) / 127.5 - 1
    return functional.pad(scaled, (0, LINE_WIDTH - target))
