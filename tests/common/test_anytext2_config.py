from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from common.anytext2.config import NetworkConfig, UNetConfig, VaeConfig, load_network_config
from common.errors import DataError, UsageError
from tests.upstream_config import network_config_from_upstream

GOLDEN = Path(__file__).parent.parent / "golden" / "tiny.safetensors"


@pytest.fixture
def upstream() -> dict[str, Any]:
    with safe_open(GOLDEN, framework="pt") as file:
        settings: dict[str, Any] = json.loads(file.metadata()["meta"])["network"]
    return settings


def test_upstream_settings_of_the_golden_network_are_understood(upstream: dict[str, Any]) -> None:
    config = network_config_from_upstream(upstream)
    assert config.unet.block_channels == (64, 128, 128)
    assert config.unet.has_attention == (True, True, False)
    assert set(config.unet.attnx_levels) == {0, 1}
    assert (config.stride, config.latent_channels, config.context_dim) == (8, 4, 768)
    assert config.clip.num_layers == 2


def test_absent_optional_upstream_settings_take_upstreams_defaults(upstream: dict[str, Any]) -> None:
    full = network_config_from_upstream(upstream)
    for key in ("use_checkpoint", "legacy", "input_attnx", "mid_attnx", "transformer_depth", "image_size"):
        del upstream["unet"][key]
    for key in ("glyph_scale", "fast_control", "num_heads"):
        del upstream["writenet"][key]
    del upstream["scale_factor"], upstream["clip"]["hidden_act"], upstream["vae"]["dropout"]
    assert network_config_from_upstream(upstream) == full


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("writenet", "fast_control", False),
        ("writenet", "glyph_scale", 2),
        ("writenet", "num_heads", 8),
        ("unet", "transformer_depth", 2),
        ("unet", "context_dim", 1024),
        ("vae", "attn_resolutions", [16]),
    ],
)
def test_upstream_settings_that_no_network_of_ours_has_are_refused_by_name(
    upstream: dict[str, Any], table: str, key: str, value: object
) -> None:
    upstream[table][key] = value
    with pytest.raises(DataError, match=key):
        network_config_from_upstream(upstream)


def test_sd15_has_the_released_sizes() -> None:
    config = load_network_config("sd15")
    assert (config.stride, config.latent_channels, config.context_dim, config.size_multiple) == (8, 4, 768, 64)


def test_a_toml_file_sets_sizes_and_the_rest_keeps_the_released_ones(tmp_path: Path) -> None:
    path = tmp_path / "network.toml"
    path.write_text("scale_factor = 1\n[vae]\nchannel_mult = [1, 2, 2]\nlatent_channels = 16\n")
    config = load_network_config(path)
    assert (config.stride, config.latent_channels, config.scale_factor) == (4, 16, 1.0)
    assert config.unet == UNetConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[unet]\nmodel_chanels = 32", "unknown key unet.model_chanels; did you mean model_channels"),
        ('[unet]\nmodel_channels = "32"', "received '32', expected int"),
        ("[unet]\nmodel_channels = 40", "a multiple of 32"),
        ("[unet]\nnum_heads = 7", "unet.num_heads"),
        ("[unet]\nattnx_levels = [3]", "levels that have attention"),
        ("[unet]\nattention_resolutions = [16]", "unet.attention_resolutions"),
        ("[vae]\nchannel_mult = [1]", "2 to 4 levels"),
        ("[clip]\nhidden_size = 50", "clip.num_heads"),
        ("placeholder_token_id = 50000", "an id of the vocabulary"),
        ("[unet", "network.toml"),
    ],
)
def test_a_wrong_toml_is_one_line_that_says_what(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "network.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        load_network_config(path)
    assert "\n" not in str(error.value)


def test_a_missing_network_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml: no such file"):
        load_network_config(tmp_path / "none.toml")


@pytest.mark.parametrize(("levels", "stride"), [((1, 2), 2), ((1, 2, 2), 4), ((1, 2, 4, 4), 8)])
def test_the_stride_follows_from_the_vaes_levels(levels: tuple[int, ...], stride: int) -> None:
    assert NetworkConfig(vae=VaeConfig(channel_mult=levels)).stride == stride
