"""A whole teacher small enough for tests, written as a checkpoint, and inputs for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.anytext2.checkpoint import write_checkpoint
from common.anytext2.config import load_network_config
from common.config import Config, load_config
from stage1_teacher.teacher.keys import teacher_shapes
from tests.golden_rule import rule_tensor

ROOT = Path(__file__).parents[2]
FONT = ROOT / "models" / "fonts" / "DejaVuSans.ttf"
DATA = ROOT / "tests" / "golden" / "data"

NETWORK = (ROOT / "bench" / "small_network.toml").read_text()

CONFIG = f"""
[model]
network = "network.toml"
checkpoint = "teacher.safetensors"
clip = "{ROOT / "models" / "tiny" / "clip"}"
device = "cpu"
[teacher]
prompt_suffix = "fine"
[inputs]
size = 64
font = "{FONT}"
edit_fraction = 0.5
[precompute]
solver_steps = 4
record_every = 2
guidance_scale = 3.0
batch_size = 2
[shards]
samples_per_shard = 3
"""


def write_teacher(folder: Path, seed: str = "") -> Path:
    """Write network.toml, teacher.safetensors and config.toml; return the last's path."""
    (folder / "network.toml").write_text(NETWORK)
    network = load_network_config(folder / "network.toml")
    tensors = {}
    for key, shape in teacher_shapes(network).items():
        tensors[key] = rule_tensor(key, shape)
        if key.startswith("model.diffusion_model.out.2.weight") and seed:
            tensors[key] = rule_tensor(key + seed, shape)
    write_checkpoint(folder / "teacher.safetensors", tensors)
    (folder / "config.toml").write_text(CONFIG)
    return folder / "config.toml"


def load(path: Path, *overrides: str) -> Config:
    return load_config(path, overrides)


def annotation(number: int, **changes: Any) -> dict[str, Any]:
    """Return an AnyWord entry of which only the text depends on the number."""
    line = {"polygon": [[60, 75], [436, 75], [436, 165], [60, 165]], "text": f"No {number}", "language": "Latin"}
    return {"img_name": "abc"[number % 3] + ".png", "caption": f"sign {number}", "annotations": [line]} | changes


def write_annotations(path: Path, *entries: Any) -> Path:
    path.write_text(json.dumps({"data_root": str(DATA / "imgs"), "data_list": entries}))
    return path


def write_prompts(path: Path, count: int, first: int = 0) -> Path:
    lines = [
        {
            "caption": f"prompt {n} " + "and more " * 60 * (n % 2),
            "lines": [{"text": f"P{n}", "box": [4, 8, 60, 30]}],
        }
        for n in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
