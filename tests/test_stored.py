"""Sets and runs that an earlier version made are the same sets and runs today (see stored/README.md)."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from common.anytext2.checkpoint import write_checkpoint
from common.anytext2.config import load_network_config
from common.anytext2.fingerprint import fingerprint
from common.config import MOVED, Config, load_config
from common.differences import require_same
from common.errors import UsageError
from shards.files.frozen import read_frozen
from shards.files.manifest import create_or_check, read_manifest
from stage1_teacher.measuring.held_out import describe_settings
from stage1_teacher.precompute import precompute
from stage1_teacher.recording.identity import build_identity
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.keys import teacher_shapes
from stage2_student.report.commands import commands
from stage2_student.report.data import ReportData, Training
from stage2_student.student.adapter import read_card
from stage2_student.train import train
from stage2_student.training.checkpoint import read_state
from stage2_student.training.run_identity import identity_of_run
from tests.golden_rule import rule_tensor

STORED = Path(__file__).parent / "stored"
STEP = Path("run") / "checkpoints" / "step-00000002"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with network.toml and teacher.safetensors."""
    folder = tmp_path_factory.mktemp("teacher")
    shutil.copy(STORED / "network.toml", folder)
    shapes = teacher_shapes(load_network_config(folder / "network.toml"))
    write_checkpoint(
        folder / "teacher.safetensors", {key: rule_tensor(key, shape) for key, shape in shapes.items()}
    )
    return folder


@pytest.fixture(params=["plain", "full"])
def place(request: pytest.FixtureRequest, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what is stored, beside its teacher."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)  # each run of a process chooses its own precision
    place = teacher / request.param
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(STORED / request.param, place)
    layout = read_manifest(place / "set").identity["text_layout"]  # of the machine that stored it
    monkeypatch.setattr("stage1_teacher.recording.identity.text_layout", lambda: layout)
    return place


def load(place: Path) -> Config:
    return load_config(place / "after.toml", [f"model.checkpoint={place.parent / 'teacher.safetensors'}"])


def no_uncond() -> Any:
    raise AssertionError("the set has its unconditional contexts")


def test_the_settings_of_before_are_refused_and_say_where_each_is_now(place: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(place / "before.toml")
    place_named, *said = re.split(": |; ", str(caught.value))
    assert place_named == str(place / "before.toml")
    before, after = (tomllib.loads((place / f"{name}.toml").read_text("utf-8")) for name in ("before", "after"))
    sections = ("teacher", "precompute")
    gone = {(name, key) for name in sections for key in before.get(name, {}).keys() - after.get(name, {}).keys()}
    assert sorted(said) == sorted(f"{name}.{key} has moved to {MOVED[f'{name}.{key}']}" for name, key in gone)
    assert after["inputs"].keys() <= {MOVED[f"{name}.{key}"].partition(".")[2] for name, key in gone}


def test_a_stored_set_is_the_set_of_the_same_settings(place: Path) -> None:
    config = load(place)
    identity = build_identity(config, RenderSettings.from_config(config))
    stored = read_manifest(place / "set").identity
    assert json.loads(json.dumps(identity)) == {
        key: value for key, value in stored.items() if key not in ("schema", "uncond_sha256")
    }
    manifest, _ = create_or_check(place / "set", identity, {}, no_uncond)
    assert manifest.identity == stored
    fresh = place / "fresh"  # a set begun today has the stored one's hash
    fresh.mkdir()
    shutil.copy(place / "set" / "uncond.safetensors", fresh)
    made, _ = create_or_check(fresh, identity, {}, no_uncond)
    assert made.identity_sha256 == manifest.identity_sha256 == read_frozen(place / "run").identity_sha256


def test_an_evaluation_begun_before_goes_on(place: Path) -> None:
    config = load(place)
    stored = json.loads((place / "evaluation.json").read_bytes())
    assert describe_settings(config, RenderSettings.from_config(config)) == stored


def test_a_stored_run_is_the_run_of_the_same_settings(place: Path) -> None:
    config = load(place)
    progression, saved = read_state(place / STEP)
    identity = identity_of_run(
        config,
        world=1,
        base_fingerprint=fingerprint(place.parent / "teacher.safetensors", "base"),
        set_hash=read_frozen(place / "run").set_hash,
    )
    assert json.loads(json.dumps(identity)) == saved
    require_same(identity, saved, str(place), "restore them")
    assert progression.step == 2


def test_what_a_stored_run_says_of_itself_can_be_read(place: Path) -> None:
    config = json.loads((place / "run" / "config.json").read_bytes())
    assert read_card(place / STEP / "lora").config == config
    training = Training(folder=place / "run", losses=(), config=config, shards=read_frozen(place / "run"))
    data = ReportData(folder=place, summary={}, examples=(), num_examples=0, trainings=(training,), invocations=())
    command, *_ = commands(data, Path("report.html"), "t")
    assert "--set train.max_steps=" in command
    assert "inputs." not in command
    assert "precompute." not in command


@pytest.mark.parametrize("place", ["full"], indirect=True)
def test_a_stored_set_needs_nothing_more_and_a_stored_checkpoint_trains_on(place: Path) -> None:
    config = load(place)
    done = precompute(config, place / "set", annotations=[], prompts=[place / "prompts.jsonl"])
    assert (done.shards_planned, done.shards_found, done.shards_written) == (2, 2, 0)
    result = train(config, shards=place / "set", run=place / "run", resume="auto")
    assert (result.resumed_from, result.steps) == (2, 4)
