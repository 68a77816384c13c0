"""The ordinary commands on a full-size network: `make smoke-sd15`.

Writes a checkpoint of every key and shape of the released AnyText2, filled by tests/golden_rule.py as
upstream ships it (.ckpt with a state_dict, float32, 6 GB), and the full-size CLIP folder; then runs precompute of
one input with 2 solver steps at 256 px, 2 training steps, sampling, and parity. Needs 24 GB of memory and 15 GB of
disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from common.config import PROJECT_ROOT
from tests.golden_rule import rule_tensor

GOLDEN = PROJECT_ROOT / "tests" / "golden"


def write_checkpoint(path: Path) -> None:
    """Write the rule-made checkpoint unless it is there."""
    if path.exists():
        return
    keys = json.loads((GOLDEN / "keys_sd15.json").read_text())
    state = {key: rule_tensor(key, tuple(shape)) for key, (shape, _) in keys.items()}
    temporary = path.with_suffix(".tmp")
    torch.save({"state_dict": state}, temporary)
    temporary.rename(path)


def write_clip_folder(path: Path) -> None:
    """Write what clip-vit-large-patch14's folder holds besides weights, which lie in the checkpoint."""
    shutil.copytree(PROJECT_ROOT / "models" / "tiny" / "clip", path, dirs_exist_ok=True)


def run(*arguments: str | Path) -> float:
    """Run a command line as a user would; return its seconds.

    Raises:
        SystemExit: the command failed.
    """
    command = [sys.executable, *map(str, arguments)]
    print("\n$ python " + " ".join(command[1:]), flush=True)
    started = time.perf_counter()
    code = subprocess.run(command, cwd=PROJECT_ROOT, check=False).returncode
    seconds = time.perf_counter() - started
    if code != 0:
        raise SystemExit(f"smoke: exit code {code} after {seconds:.0f} s")
    print(f"[{seconds:.0f} s]", flush=True)
    return seconds


def main() -> None:
    """Run all steps and print a table of seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=PROJECT_ROOT / "build" / "smoke-sd15", help="folder")
    parser.add_argument("--golden", type=Path, action="append", default=[], help="golden file (again for more)")
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    write_checkpoint(work / "anytext_v2.0.ckpt")
    write_clip_folder(work / "clip")
    seconds = {"write checkpoint": time.perf_counter() - started}

    prompts = work / "prompts.jsonl"
    line = {"text": "OPEN", "box": [40, 90, 216, 160], "color": "#d01818"}
    prompts.write_text(json.dumps({"caption": "a storefront with a sign", "lines": [line]}) + "\n")
    settings = [
        f"model.checkpoint={work / 'anytext_v2.0.ckpt'}",
        f"model.clip={work / 'clip'}",
        "model.dtype=float32",
        "inputs.size=256",
        "precompute.solver_steps=2",
        "precompute.batch_size=1",
        "train.max_steps=2",
        "train.num_phases=1",
        "train.batch_size=1",
        "train.gradient_accumulation=1",
        "train.mixed_precision=no",
        "train.num_workers=0",
        "train.ema_decay=0",
        "lora.rank=8",
    ]
    config = ["--config", "configs/sd15.toml", *(part for value in settings for part in ("--set", value))]
    for name in ("shards", "run"):
        shutil.rmtree(work / name, ignore_errors=True)
    steps: dict[str, list[str | Path]] = {
        "precompute": ["precompute", *config, "--prompts", prompts, "--out", work / "shards"],
        "finalize": ["finalize", "--shards", work / "shards"],
        "train": ["train", *config, "--shards", work / "shards", "--out", work / "run"],
        "sample": [
            *("sample", *config, "--adapter", work / "run", "--record", "0"),
            *("--shards", work / "shards", "--out", work / "sample.png"),
        ],
    }
    for name, step in steps.items():
        seconds[name] = run("pipeline.py", *step)
    seconds["parity"] = run("-m", "tests.parity", *(arguments.golden or [GOLDEN / "tiny.safetensors"]))
    print("\nstep              seconds")
    for name, value in seconds.items():
        print(f"{name:16s} {value:8.0f}")


if __name__ == "__main__":
    main()
