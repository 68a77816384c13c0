"""Sizes of the network: the released AnyText2 (`sd15`) or any smaller one of the same build."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, PositiveFloat, model_validator

from common.toml import Count, Section, build, read_toml, require

GROUPS = 32
"""Groups of every GroupNorm of the released model."""

Levels = Annotated[tuple[int, ...], Field(strict=False)]
Widths = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
FourWidths = Annotated[Widths, Field(min_length=4, max_length=4)]


class UNetConfig(Section):
    """Sizes of the UNet; WriteNet's trunk has the same ones."""

    model_channels: Count = 320
    """Channels of the first level, a multiple of norm_groups."""
    norm_groups: Count = GROUPS
    """Groups of every GroupNorm. With as many as channels a picture's flat colour is normalised away."""
    channel_mult: Widths = (1, 2, 4, 4)
    """Channels of each level, shallow to deep, in units of model_channels."""
    num_res_blocks: Count = 2
    """Residual blocks of a level on the way down (one more on the way up)."""
    attention_resolutions: Levels = (4, 2, 1)
    """Downsampling factors, 1 being the latents' own size, at which there is attention."""
    num_heads: Count = 8
    """Attention heads of every block."""
    attnx_mid: bool = True
    """AttnX in the middle block."""
    attnx_levels: Levels = (2, 1)
    """Levels (0 = shallowest) whose blocks on the way up have AttnX."""
    attnx_down: bool = False
    """AttnX in the blocks on the way down."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        even = self.model_channels % self.norm_groups == 0
        require(even, "model_channels", self.model_channels, f"a multiple of {self.norm_groups}")
        for width in self.block_channels:
            require(width % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of {width}")
        allowed = {2**level for level in range(len(self.channel_mult))}
        extra = set(self.attention_resolutions) - allowed
        require(not extra, "attention_resolutions", sorted(extra), f"some of {sorted(allowed)}")
        missing = set(self.attnx_levels) - {i for i, has in enumerate(self.has_attention) if has}
        require(not missing, "attnx_levels", sorted(missing), "levels that have attention")
        return self

    @property
    def block_channels(self) -> tuple[int, ...]:
        """Channels of each level, shallow to deep."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @property
    def has_attention(self) -> tuple[bool, ...]:
        """Whether each level, shallow to deep, has attention."""
        return tuple(2**level in self.attention_resolutions for level in range(len(self.channel_mult)))

    @property
    def downsampling(self) -> int:
        """Factor between the latents' size and the deepest level's."""
        return 2 ** (len(self.channel_mult) - 1)


class WriteNetConfig(Section):
    """Widths of WriteNet's hint blocks, whose strides follow from the VAE's."""

    glyph_widths: FourWidths = (16, 32, 96, 256)
    """Channels of the glyph block's four stages."""
    position_widths: FourWidths = (8, 16, 32, 64)
    """Channels of the position block's four stages."""


class VaeConfig(Section):
    """Sizes of the autoencoder."""

    channels: Count = 128
    """Channels of the first level, a multiple of norm_groups."""
    norm_groups: Count = GROUPS
    """Groups of every GroupNorm."""
    channel_mult: Widths = (1, 2, 4, 4)
    """Channels of each level in units of `channels`; n levels give a stride of 2^(n-1)."""
    num_res_blocks: Count = 2
    """Residual blocks of a level of the encoder (one more in the decoder)."""
    latent_channels: Count = 4
    """Channels of the latents."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            self.channels % self.norm_groups == 0, "channels", self.channels, f"a multiple of {self.norm_groups}"
        )
        require(len(self.channel_mult) in (2, 3, 4), "channel_mult", self.channel_mult, "2 to 4 levels")
        return self


class ClipConfig(Section):
    """Sizes of the text encoder."""

    hidden_size: Count = 768
    """Width of a context (c), of UNet's and WriteNet's cross-attention and of the line embeddings."""
    intermediate_size: Count = 3072
    """Width of a layer's feed-forward part."""
    num_layers: Count = 12
    """Transformer layers."""
    num_heads: Count = 12
    """Attention heads of a layer."""
    vocab_size: Count = 49408
    """Tokens that are known."""
    max_positions: Count = 77
    """Tokens of one encoding."""
    hidden_act: str = "quick_gelu"
    """Activation of the feed-forward parts, by transformers' name."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        divides = self.hidden_size % self.num_heads == 0
        require(divides, "num_heads", self.num_heads, f"a divisor of {self.hidden_size}")
        return self


class NetworkConfig(Section):
    """Sizes of all parts. The defaults are the released model's."""

    unet: UNetConfig = UNetConfig()
    writenet: WriteNetConfig = WriteNetConfig()
    vae: VaeConfig = VaeConfig()
    clip: ClipConfig = ClipConfig()
    scale_factor: PositiveFloat = 0.18215
    """Latents are the VAE's mean times this."""
    placeholder_token_id: Annotated[int, Field(ge=0)] = 265
    """CLIP's id of `*` as a word of its own, which stands for a line of text."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = self.placeholder_token_id < self.clip.vocab_size
        require(known, "placeholder_token_id", self.placeholder_token_id, "an id of the vocabulary")
        return self

    @property
    def latent_channels(self) -> int:
        """Channels of the latents (4 in the released model)."""
        return self.vae.latent_channels

    @property
    def stride(self) -> int:
        """Pixels per latent cell (8 in the released model)."""
        return int(2 ** (len(self.vae.channel_mult) - 1))

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of a square image of so many pixels a side."""
        return self.latent_channels, size // self.stride, size // self.stride

    @property
    def context_dim(self) -> int:
        """Width of the contexts (768 in the released model)."""
        return self.clip.hidden_size

    @property
    def size_multiple(self) -> int:
        """Image sides must be multiples of this (64 in the released model)."""
        return self.stride * self.unet.downsampling

    @classmethod
    def sd15(cls) -> NetworkConfig:
        """Return the released AnyText2's sizes."""
        return cls()


def load_network_config(name_or_path: str | Path) -> NetworkConfig:
    """Return the network named "sd15", or read one from a TOML file with the fields of `NetworkConfig`.

    Raises:
        UsageError: the file is missing or not TOML, or a key, type or value is wrong.
    """
    if str(name_or_path) == "sd15":
        return NetworkConfig.sd15()
    path = Path(name_or_path)
    return build(NetworkConfig, read_toml(path, "network file"), str(path))
