"""The embedded teacher's networks before training, at the geometry of models/tiny/network.toml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional

from common.anytext2.config import NetworkConfig, load_network_config
from common.anytext2.unet import UNet
from common.anytext2.vae import VAE
from common.anytext2.writenet import WriteNet
from stage1_teacher.teacher.glyph_embedding import GlyphEmbedding
from stage1_teacher.teacher.text_encoder import build_clip

MODEL_FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny"
BRANCH_SCALE = 0.3
"""Residual branches start this much smaller than PyTorch has them: nearly the identity, and with gradients."""

CONTEXT_GAIN = 2.6
"""Cross-attention's values and outputs start this much larger than PyTorch has them."""

GLYPH_GAIN = 1.2784645
"""silu of it is 1."""

NORM_OFFSET, SILU_GAIN, SILU_SHIFT = 10.0, 0.5, 8.0
"""Of z_t on its way through the UNet's last norm and silu: see `_pass_through`."""

WORD_SCALE = 0.5
"""Standard deviation of the words' embeddings at the start."""

COLOR_GAIN, LINE_MARK, LINE_SCORE = 2.0, 6.0, 4.5
"""Of a line's embedding: its colour's size, the size of the direction that all lines share, and the attention
score that this direction gets in WriteNet."""


def network_config() -> NetworkConfig:
    """Read models/tiny/network.toml."""
    return load_network_config(MODEL_FOLDER / "network.toml")


def build_vae(config: NetworkConfig | None = None) -> Any:
    """Build the VAE (diffusers' AutoencoderKL) with random weights."""
    return VAE(config or network_config()).autoencoder


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Denoiser:
    """What `train_denoiser` trains. The glyph embedding's two encoders are given, not trained."""

    unet: UNet
    writenet: WriteNet
    clip: Any
    embedding: GlyphEmbedding

    def modules(self) -> dict[str, nn.Module]:
        """Return the parts by the names that checkpoints know them by."""
        return {"unet": self.unet, "writenet": self.writenet, "clip": self.clip, "embedding": self.embedding}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        parts = {"unet": self.unet, "writenet": self.writenet, "clip": self.clip}
        named = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
        for name, p in self.embedding.named_parameters():
            if not name.startswith(("font_predictor.", "position_encoder.")):
                named[f"embedding.{name}"] = p
        return named


def build_denoiser(config: NetworkConfig, seed: int) -> Denoiser:
    """Build the networks with weights from which a small network learns fast."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = Denoiser(
            unet=UNet(config),
            writenet=WriteNet(config),
            clip=build_clip(config),
            embedding=GlyphEmbedding(config.context_dim),
        )
        _start(denoiser)
    return denoiser


@torch.no_grad()
def _start(denoiser: Denoiser) -> None:
    for module in (denoiser.unet, denoiser.writenet):
        for part in module.modules():
            if isinstance(part, ResnetBlock2D):
                part.conv2.weight.mul_(BRANCH_SCALE)
            elif isinstance(part, BasicTransformerBlock):
                _strengthen_cross_attention(part)
    # From scratch there is no trained UNet to protect: control may speak from the first step, except into the
    # first skip connection, which starts as the straight way of z_t to the output.
    first, *others = denoiser.writenet.controlnet_down_blocks
    for conv in [*others, denoiser.writenet.controlnet_mid_block]:
        nn.init.normal_(conv.weight, std=BRANCH_SCALE / conv.weight.shape[1] ** 0.5)
    nn.init.zeros_(first.weight)
    _pass_through(denoiser.unet)
    _hand_on_pixels(denoiser.writenet.controlnet_cond_embedding.glyph_block)
    # CLIP starts its tables at 0.02, which a few thousand steps hardly leave.
    nn.init.normal_(denoiser.clip.embeddings.token_embedding.weight, std=WORD_SCALE)
    nn.init.normal_(denoiser.clip.embeddings.position_embedding.weight, std=0.3)
    point_at_lines(denoiser)


def point_at_lines(denoiser: Denoiser) -> None:
    """Let WriteNet look at the lines' tokens, and let colour be most of what they say.

    A text caption is one to three such tokens among 77. Spread evenly, attention makes of a line's colour less
    than a hundredth of the residuals, and training then makes colour vanish instead of hearing it.
    """
    # Colours come as 0-255 and are normalised afterwards: the bias must not vanish beside them, or black,
    # grey and white are one colour.
    color: Any = denoiser.embedding.color_proj[0]
    nn.init.normal_(color.weight, std=1 / 128)
    nn.init.normal_(color.bias, std=0.7)
    norm: Any = denoiser.embedding.color_proj[1]
    norm.weight.fill_(COLOR_GAIN)
    # Lines' tokens share a direction; each head's keys along it lie where a constant part of its queries points.
    width = len(norm.bias)
    direction = torch.randn(width)
    direction /= direction.norm()
    norm.bias.copy_(LINE_MARK * direction)
    for block in denoiser.writenet.modules():
        if isinstance(block, BasicTransformerBlock):
            attention, heads = block.attn2, block.attn2.heads
            nn.init.normal_(block.norm2.bias, std=2.0)
            constant = (attention.to_q.weight @ block.norm2.bias).reshape(heads, -1)
            constant = constant / constant.square().sum(1, keepdim=True) * constant.shape[1] ** 0.5
            attention.to_k.weight.add_(LINE_SCORE / 2.3 * torch.outer(constant.flatten(), direction))


def _strengthen_cross_attention(block: BasicTransformerBlock) -> None:
    """Let a context be heard from the first step.

    At the start attention is spread over 77 tokens and PyTorch's gains make of it 3 % of the features: training
    then finds the captions after thousands of steps only.
    """
    for attention in (block.attn2, getattr(block, "attn2x", None)):
        if attention is not None:
            for linear in (attention.to_v, attention.to_out[0]):
                linear.weight.mul_(CONTEXT_GAIN)


def _hand_on_pixels(glyph_block: nn.Sequential) -> None:
    """Let the glyph block start by handing on each pixel: its last layer has the 16 pixels of every cell.

    Glyphs are 0 or 1, and silu(GLYPH_GAIN) = 1: a layer that copies with that gain gives 0 and 1 again. A strided
    convolution copies a 2 x 2 neighbourhood into four channels.
    """
    channels = 1
    for conv in glyph_block:
        if isinstance(conv, nn.Conv2d):
            taps = [(1, 1)] if conv.stride == (1, 1) else [(1, 1), (1, 2), (2, 1), (2, 2)]
            for place, (dy, dx) in enumerate(taps):
                for channel in range(channels):
                    target = place * channels + channel
                    conv.weight[target] = 0
                    conv.weight[target, channel, dy, dx] = GLYPH_GAIN
                    if conv.bias is not None:
                        conv.bias[target] = 0
            channels *= len(taps)


def _pass_through(unet: UNet) -> None:
    """Let the UNet start as eps = z_t, which it is at high noise; what is left to learn is the picture.

    z_t runs through the first convolution, the outermost skip connection and the last residual block's shortcut.
    There its channels fill whole groups of the last norm. A norm brings whatever noise there is to the same size:
    what a solve has too much of would then stay to the end, as grain, and gnaw at the letters. Constants of both
    signs, much larger than z_t, keep the group's spread the same however much noise there is; and the silu is used
    where it is nearly straight: at high noise an error of eps weighs tenfold in x0.
    """
    channels = unet.conv_in.weight.shape[1]
    last = unet.up_blocks[-1].resnets[-1]
    hidden = last.conv_shortcut.weight.shape[1] - unet.conv_in.weight.shape[0]
    for conv, source, tap in ((unet.conv_in, 0, 1), (last.conv_shortcut, hidden, 0)):
        conv.weight[:channels] = 0
        conv.bias[:channels] = 0
        for channel in range(channels):
            conv.weight[channel, source + channel, tap, tap] = 1
    offsets = NORM_OFFSET * (1 - 2 * (torch.arange(channels) % 2)).float()  # their mean in a group is 0
    last.conv_shortcut.bias[:channels] = offsets
    spread = (1 + NORM_OFFSET**2) ** 0.5
    unet.conv_norm_out.weight[:channels] = SILU_GAIN * spread
    unet.conv_norm_out.bias[:channels] = SILU_SHIFT - SILU_GAIN * offsets
    unet.conv_out.weight.mul_(0.1)
    unet.conv_out.weight[:, :channels] = 0
    for channel in range(channels):
        unet.conv_out.weight[channel, channel, 1, 1] = 1 / SILU_GAIN
    unet.conv_out.bias.fill_(-functional.silu(torch.tensor(SILU_SHIFT)).item() / SILU_GAIN)
