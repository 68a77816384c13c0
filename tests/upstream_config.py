"""Sizes of a network as AnyText2's own YAML files spell them, e.g. in the metadata of golden files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.anytext2.config import ClipConfig, NetworkConfig, UNetConfig, VaeConfig, WriteNetConfig
from common.errors import DataError

TRUNK_KEYS = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads")


def network_config_from_upstream(network: Mapping[str, Any]) -> NetworkConfig:
    """Read AnyText2's own settings.

    Args:
        network: tables `unet`, `writenet`, `vae` and `clip` with the keys of upstream's YAML, and optionally
            `scale_factor` and `placeholder_token_id`. An absent key means what it means upstream.

    Raises:
        DataError: a table is missing, or a setting asks for what no AnyText2 network has.
    """
    for name in ("unet", "writenet", "vae", "clip"):
        if not isinstance(network.get(name), Mapping):
            raise DataError(f"upstream network settings: no table {name!r}; received {sorted(network)}")
    unet, writenet, vae = network["unet"], network["writenet"], network["vae"]
    _check_trunk(unet, "unet")
    _check_trunk(writenet, "writenet")
    _expect(writenet, "writenet", {"glyph_channels": 1, "glyph_scale": 1, "position_channels": 1})
    _expect(writenet, "writenet", {"fast_control": True})
    for key in TRUNK_KEYS:
        if key in writenet and _plain(writenet[key]) != _plain(unet[key]):
            raise DataError(
                f"upstream network settings: {key} is {unet[key]} in unet, {writenet[key]} in writenet"
            )
    _expect(vae, "vae", {"double_z": True, "attn_resolutions": [], "in_channels": 3, "out_ch": 3})
    config = NetworkConfig(
        unet=_unet(unet),
        writenet=WriteNetConfig(),
        vae=VaeConfig(
            channels=vae["ch"],
            channel_mult=tuple(vae["ch_mult"]),
            num_res_blocks=vae["num_res_blocks"],
            latent_channels=vae["z_channels"],
        ),
        clip=_clip(network["clip"]),
        scale_factor=float(network.get("scale_factor", 0.18215)),
        placeholder_token_id=int(network.get("placeholder_token_id", 265)),
    )
    for table, name in ((unet, "unet"), (writenet, "writenet")):
        _expect(table, name, {"in_channels": config.latent_channels, "context_dim": config.context_dim})
    return config


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _expect(table: Mapping[str, Any], name: str, expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if key in table and _plain(table[key]) != value:
            raise DataError(
                f"upstream network settings: {name}.{key} is {table[key]!r}, only {value!r} is supported"
            )


def _check_trunk(table: Mapping[str, Any], name: str) -> None:
    _expect(table, name, {"use_spatial_transformer": True, "transformer_depth": 1, "legacy": False})
    _expect(table, name, {"num_head_channels": -1, "use_linear_in_transformer": False})
    for key in TRUNK_KEYS if name == "unet" else ():
        if key not in table:
            raise DataError(f"upstream network settings: {name}.{key} is missing")


def _unet(table: Mapping[str, Any]) -> UNetConfig:
    attention = tuple(int(factor) for factor in table["attention_resolutions"])
    mult = tuple(int(m) for m in table["channel_mult"])
    all_levels = [level for level in range(len(mult)) if 2**level in attention]
    levels = table.get("output_attnx_level", all_levels) if table.get("output_attnx", True) else []
    return UNetConfig(
        model_channels=int(table["model_channels"]),
        channel_mult=mult,
        num_res_blocks=int(table["num_res_blocks"]),
        attention_resolutions=attention,
        num_heads=int(table["num_heads"]),
        attnx_mid=bool(table.get("mid_attnx", True)),
        attnx_levels=tuple(sorted((int(v) for v in levels if int(v) in all_levels), reverse=True)),
        attnx_down=bool(table.get("input_attnx", False)),
    )


def _clip(table: Mapping[str, Any]) -> ClipConfig:
    default = ClipConfig()
    return ClipConfig(
        hidden_size=int(table.get("hidden_size", default.hidden_size)),
        intermediate_size=int(table.get("intermediate_size", default.intermediate_size)),
        num_layers=int(table.get("num_hidden_layers", default.num_layers)),
        num_heads=int(table.get("num_attention_heads", default.num_heads)),
        vocab_size=int(table.get("vocab_size", default.vocab_size)),
        max_positions=int(table.get("max_position_embeddings", default.max_positions)),
        hidden_act=str(table.get("hidden_act", default.hidden_act)),
    )
