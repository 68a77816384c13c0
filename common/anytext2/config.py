"""Sizes of the network: the released AnyText2 (`sd15`) or any smaller one of the same build."""

from __future__ import annotations

import difflib
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from common.errors import UsageError

T = TypeVar("T")
GROUPS = 32
"""Groups of every GroupNorm of the released model."""


def _require(condition: bool, what: str, received: object, expected: str) -> None:
    if not condition:
        raise UsageError(f"network {what}: received {received!r}, expected {expected}")


def _require_positive(section: str, owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        values = value if isinstance(value, tuple) else (value,)
        _require(len(values) > 0 and min(values) >= 1, f"{section}.{name}", value, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig:
    """Sizes of the UNet; WriteNet's trunk has the same ones."""

    model_channels: int = 320
    """Channels of the first level, a multiple of norm_groups."""
    norm_groups: int = GROUPS
    """Groups of every GroupNorm. With as many as channels a picture's flat colour is normalised away."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level, shallow to deep, in units of model_channels."""
    num_res_blocks: int = 2
    """Residual blocks of a level on the way down (one more on the way up)."""
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    """Downsampling factors, 1 being the latents' own size, at which there is attention."""
    num_heads: int = 8
    """Attention heads of every block."""
    attnx_mid: bool = True
    """AttnX in the middle block."""
    attnx_levels: tuple[int, ...] = (2, 1)
    """Levels (0 = shallowest) whose blocks on the way up have AttnX."""
    attnx_down: bool = False
    """AttnX in the blocks on the way down."""

    def __post_init__(self) -> None:
        names = ("model_channels", "norm_groups", "channel_mult", "num_res_blocks", "num_heads")
        _require_positive("unet", self, *names)
        even = self.model_channels % self.norm_groups == 0
        _require(even, "unet.model_channels", self.model_channels, f"a multiple of {self.norm_groups}")
        for width in self.block_channels:
            _require(width % self.num_heads == 0, "unet.num_heads", self.num_heads, f"a divisor of {width}")
        allowed = {2**level for level in range(len(self.channel_mult))}
        extra = set(self.attention_resolutions) - allowed
        _require(not extra, "unet.attention_resolutions", sorted(extra), f"some of {sorted(allowed)}")
        missing = set(self.attnx_levels) - {i for i, has in enumerate(self.has_attention) if has}
        _require(not missing, "unet.attnx_levels", sorted(missing), "levels that have attention")

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


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteNetConfig:
    """Widths of WriteNet's hint blocks, whose strides follow from the VAE's."""

    glyph_widths: tuple[int, ...] = (16, 32, 96, 256)
    """Channels of the glyph block's four stages."""
    position_widths: tuple[int, ...] = (8, 16, 32, 64)
    """Channels of the position block's four stages."""

    def __post_init__(self) -> None:
        for name in ("glyph_widths", "position_widths"):
            _require(len(getattr(self, name)) == 4, f"writenet.{name}", getattr(self, name), "four widths")
        _require_positive("writenet", self, "glyph_widths", "position_widths")


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeConfig:
    """Sizes of the autoencoder."""

    channels: int = 128
    """Channels of the first level, a multiple of norm_groups."""
    norm_groups: int = GROUPS
    """Groups of every GroupNorm."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level in units of `channels`; n levels give a stride of 2^(n-1)."""
    num_res_blocks: int = 2
    """Residual blocks of a level of the encoder (one more in the decoder)."""
    latent_channels: int = 4
    """Channels of the latents."""

    def __post_init__(self) -> None:
        names = ("channels", "norm_groups", "channel_mult", "num_res_blocks", "latent_channels")
        _require_positive("vae", self, *names)
        even = self.channels % self.norm_groups == 0
        _require(even, "vae.channels", self.channels, f"a multiple of {self.norm_groups}")
        _require(len(self.channel_mult) in (2, 3, 4), "vae.channel_mult", self.channel_mult, "2 to 4 levels")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Sizes of the text encoder."""

    hidden_size: int = 768
    """Width of a context (c), of UNet's and WriteNet's cross-attention and of the line embeddings."""
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    vocab_size: int = 49408
    max_positions: int = 77
    hidden_act: str = "quick_gelu"

    def __post_init__(self) -> None:
        names = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "vocab_size", "max_positions")
        _require_positive("clip", self, *names)
        divides = self.hidden_size % self.num_heads == 0
        _require(divides, "clip.num_heads", self.num_heads, f"a divisor of {self.hidden_size}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """Sizes of all parts. The defaults are the released model's."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    writenet: WriteNetConfig = field(default_factory=WriteNetConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    scale_factor: float = 0.18215
    """Latents are the VAE's mean times this."""
    placeholder_token_id: int = 265
    """CLIP's id of `*` as a word of its own, which stands for a line of text."""

    def __post_init__(self) -> None:
        _require(self.scale_factor > 0, "scale_factor", self.scale_factor, "above 0")
        known = 0 <= self.placeholder_token_id < self.clip.vocab_size
        _require(known, "placeholder_token_id", self.placeholder_token_id, "an id of the vocabulary")

    @property
    def latent_channels(self) -> int:
        """Channels of the latents (4 in the released model)."""
        return self.vae.latent_channels

    @property
    def stride(self) -> int:
        """Pixels per latent cell (8 in the released model)."""
        return int(2 ** (len(self.vae.channel_mult) - 1))

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
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f'network {path}: no such file; expected "sd15" or a TOML file') from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"network file {path}: {error}") from None
    return _build(NetworkConfig, table, str(path))


def _build(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in {f.name for f in fields(typing.cast(Any, kind))}:
            close = difflib.get_close_matches(key, hints, n=1) or sorted(hints)
            raise UsageError(f"{where}: unknown key {key}; did you mean {', '.join(close)}?")
        values[key] = _convert(value, hints[key], f"{where}: {key}")
    return kind(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    if isinstance(value, dict) and hasattr(hint, "__dataclass_fields__"):
        return _build(hint, value, where)
    if typing.get_origin(hint) is tuple and isinstance(value, list) and all(type(v) is int for v in value):
        return tuple(value)
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise UsageError(f"{where}: received {value!r}, expected {getattr(hint, '__name__', hint)}")
