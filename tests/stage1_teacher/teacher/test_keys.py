from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from common.anytext2.checkpoint import export_state
from common.anytext2.config import NetworkConfig
from common.anytext2.keys import PREFIXES
from stage1_teacher.teacher.keys import PART_BUILDERS, teacher_shapes
from tests.upstream_config import network_config_from_upstream

GOLDEN = Path(__file__).parents[2] / "golden"


def config_of(which: str) -> NetworkConfig:
    if which == "sd15":
        return NetworkConfig.sd15()
    with safe_open(GOLDEN / "tiny.safetensors", framework="pt") as file:
        return network_config_from_upstream(json.loads(file.metadata()["meta"])["network"])


@pytest.mark.parametrize(("which", "count"), [("tiny", 1271), ("sd15", 2047)])
def test_all_keys_of_upstreams_checkpoint_are_ours_in_both_directions(which: str, count: int) -> None:
    config = config_of(which)
    listed = json.loads((GOLDEN / f"keys_{which}.json").read_text())
    assert teacher_shapes(config) == {key: tuple(shape) for key, (shape, _) in listed.items()}
    exported = {}
    for part, build in PART_BUILDERS.items():
        with torch.device("meta"):
            module = build(config)
        state = export_state(module, part, config)
        assert all(key.startswith(PREFIXES[part]) for key in state)
        exported.update(state)
    assert len(exported) + 13 == len(listed) == count
    for key, value in exported.items():
        assert [list(value.shape), str(value.dtype).removeprefix("torch.")] == listed[key], key
