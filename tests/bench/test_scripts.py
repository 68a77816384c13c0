"""Each benchmark's script still runs, at the smallest size.

bench_tasks.py runs whole processes and takes minutes at any size; solve_profile.py needs layouts that can be read;
scaling.py and demo_figures.py have tests of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import bench_shards
from bench.gpu.place import Place
from bench.rule_weights import CALM, LAST_LAYER, make_weights, rule_tensor
from common.anytext2.checkpoint_file import CheckpointFile


@pytest.fixture
def run(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script's main as `python bench/NAME.py ARGUMENTS` does; returns what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
        importlib.import_module(f"bench.{name}").main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def small(place: Place) -> list[str]:
    """Options of scripts that take a configuration."""
    config = place.config()
    settings = (
        *place.size.settings,
        f"model.checkpoint={config.model.checkpoint}",
        f"model.clip={config.model.clip}",
    )
    options = ["--config", str(place.out / "small.toml")]
    return [*options, *(part for setting in settings for part in ("--set", setting))]


def test_stage_ones_rate_is_measured(run: Callable[..., str], small: list[str]) -> None:
    assert "median" in run("bench_precompute", *small, "--inputs", "2", "--rounds", "1")


def test_training_from_shards_and_beside_the_teacher_is_measured(
    run: Callable[..., str], small: list[str]
) -> None:
    lines = run("bench_train", *small, "--records", "4", "--rounds", "1").splitlines()
    cases = ["one batch in memory", "from shards", "from shards, 1 worker", "teacher online"]
    assert [line[:24].strip() for line in lines[-4:]] == cases


def test_devices_are_compared(run: Callable[..., str], small: list[str]) -> None:
    assert "| UNet, with WriteNet | " in run("devices", *small)


@pytest.mark.parametrize("part", ["loader", "writer"])
def test_shards_are_measured(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    for name, value in {"SIDE": 64, "LATENT": 8, "PER_SHARD": 2, "SHARDS": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(bench_shards, name, value)
    assert "peak memory" in run("bench_shards", "--part", part)


def test_weights_are_made_up_by_the_rule(run: Callable[..., str], place: Place, tmp_path: Path) -> None:
    out = tmp_path / "made_up.safetensors"
    assert run("made_up", "--config", str(place.out / "small.toml"), "--out", str(out)) == f"{out}\n"
    file, key = CheckpointFile(out), "model.diffusion_model.input_blocks.0.0.weight"
    assert file.read(key).equal(rule_tensor(key, file.shapes[key]).half())
    assert file.read(LAST_LAYER).equal((rule_tensor(LAST_LAYER, file.shapes[LAST_LAYER]) * CALM).half())
    again = make_weights({key: file.shapes[key]})
    assert again[key].equal(file.read(key))
