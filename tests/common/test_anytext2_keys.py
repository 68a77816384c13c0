from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from common.anytext2.config import NetworkConfig
from common.anytext2.keys import PREFIXES, key_table, part_of
from common.anytext2.unet import UNet
from common.anytext2.vae import VAE
from common.anytext2.writenet import WriteNet
from tests.upstream_config import network_config_from_upstream

GOLDEN = Path(__file__).parent.parent / "golden"
PARTS: dict[str, type[nn.Module]] = {"unet": UNet, "writenet": WriteNet, "vae": VAE}


def config_of(which: str) -> NetworkConfig:
    if which == "sd15":
        return NetworkConfig.sd15()
    with safe_open(GOLDEN / "tiny.safetensors", framework="pt") as file:
        return network_config_from_upstream(json.loads(file.metadata()["meta"])["network"])


@pytest.mark.parametrize("which", ["tiny", "sd15"])
@pytest.mark.parametrize("part", list(PARTS))
def test_every_key_and_shape_of_upstreams_checkpoint_has_one_parameter_of_ours(which: str, part: str) -> None:
    config = config_of(which)
    with torch.device("meta"):
        state = PARTS[part](config).state_dict()
    table = key_table(part, state, config)
    ours = {entry.key: list(entry.upstream_shape(state[name].shape)) for name, entry in table.items()}
    listed = json.loads((GOLDEN / f"keys_{which}.json").read_text())
    assert ours == {key: shape for key, (shape, _) in listed.items() if key.startswith(PREFIXES[part])}
    back = {entry.key: name for name, entry in table.items()}
    assert [back[table[name].key] for name in state] == list(state)  # a bijection


def test_the_released_model_has_attnx_where_upstream_says() -> None:
    with torch.device("meta"):
        names = UNet(NetworkConfig.sd15()).state_dict()
    tensors = [name for name in names if "attn1x" in name or "attn2x" in name]
    assert len(tensors) == 70
    assert {name.split(".attentions")[0] for name in tensors} == {"mid_block", "up_blocks.1", "up_blocks.2"}


def test_a_foreign_parameter_name_is_a_bug_not_a_guess() -> None:
    with pytest.raises(ValueError, match=r"no rule for the parameter class_embedding\.weight"):
        key_table("unet", ["class_embedding.weight"], NetworkConfig.sd15())


def test_names_that_would_share_a_key_are_refused() -> None:
    with pytest.raises(ValueError, match="share a checkpoint key"):
        key_table("clip", ["text_model.final_layer_norm.bias", "final_layer_norm.bias"], NetworkConfig.sd15())


def test_keys_are_assigned_to_parts_by_their_prefix() -> None:
    assert part_of("control_model.zero_convs.0.0.weight") == "writenet"
    assert part_of("alphas_cumprod") == "schedule"
    assert part_of("cond_stage_model.transformer.text_model.embeddings.position_ids") == "clip"
    assert part_of("optimizer.state") is None
