"""Training as real processes: stopped by a signal, resumed without the teacher's code, and two side by side."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common.config import PROJECT_ROOT
from stage2_student.student.adapter import load_tensors
from stage2_student.student.checkpoint_folders import newest_checkpoint
from stage2_student.train import train
from stage2_student.training.runlog import read_log
from tests.stage2_student.conftest import Configure

TIMES = {"samples_per_second", "step_seconds", "data_wait_seconds"}
RUN_AND_LIST_MODULES = """
import json, runpy, sys
sys.argv = ["pipeline.py", *sys.argv[2:]]
sys.path.insert(0, ".")  # as when it is run as a script
try:
    runpy.run_path("pipeline.py", run_name="__main__")
finally:
    json.dump(sorted(sys.modules), open({modules!r}, "w"))
"""
MAX_STEPS = 24


def toml_of(base_folder: Path, **train_settings: object) -> str:
    lines = [
        "[model]",
        f'network = "{base_folder / "network.toml"}"',
        f'checkpoint = "{base_folder / "base.safetensors"}"',
        'device = "cpu"',
        "[lora]",
        "rank = 4",
        "alpha = 4",
        'targets = ["to_q", "conv1"]',
        "[train]",
        *(f"{key} = {json.dumps(value)}" for key, value in train_settings.items()),
    ]
    return "\n".join(lines)


SETTINGS = {
    "num_phases": 2,
    "max_steps": MAX_STEPS,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "num_workers": 0,
    "log_every": 2,
    "checkpoint_every": 1000,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """A run that was stopped by SIGTERM and taken up by a checkout without stage one."""

    run: Path
    modules: list[str]
    stopped: subprocess.CompletedProcess[str]
    steps_when_stopped: int
    resumed: subprocess.CompletedProcess[str]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="module")
def story(base_folder: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "small.toml").write_text(toml_of(base_folder, **SETTINGS))
    run, modules = folder / "run", folder / "modules.json"
    arguments = ["train", "--config", str(folder / "small.toml"), "--shards", str(shards), "--out", str(run)]

    code = RUN_AND_LIST_MODULES.format(modules=str(modules))
    command = [sys.executable, "-c", code, "pipeline.py", *arguments]
    process = subprocess.Popen(
        command, cwd=PROJECT_ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while len(read_log(run)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    stopped = subprocess.CompletedProcess(command, process.returncode, out, err)
    checkpoint = newest_checkpoint(run / "checkpoints")
    steps = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0

    copy = folder / "project"
    leave_out = shutil.ignore_patterns("stage1_teacher", "__pycache__", "evaluation")
    for name in ("common", "shards", "stage2_student"):
        shutil.copytree(PROJECT_ROOT / name, copy / name, ignore=leave_out)
    shutil.copy(PROJECT_ROOT / "pipeline.py", copy)
    command = [sys.executable, "pipeline.py", *arguments, "--resume", "auto"]
    resumed = subprocess.run(
        command, cwd=copy, env=environment(), capture_output=True, text=True, check=False, timeout=300
    )
    loaded = json.loads(modules.read_text())
    return Story(run=run, modules=loaded, stopped=stopped, steps_when_stopped=steps, resumed=resumed)


def test_training_loads_nothing_of_the_teacher(story: Story) -> None:
    assert "stage2_student.train" in story.modules
    forbidden = (
        "stage1_teacher",
        "both_stages",
        "transformers.models.clip",
        "onnxruntime",
        "rapidocr_onnxruntime",
        "cv2",
    )
    assert [
        m for m in story.modules if m.startswith(forbidden) or "recognizer" in m or "ocr" in m.split(".")
    ] == []


def test_a_signal_stops_a_run_with_a_checkpoint_and_exit_code_75(story: Story) -> None:
    assert story.stopped.returncode == 75, story.stopped.stderr
    assert 4 <= story.steps_when_stopped < MAX_STEPS
    assert f"step {story.steps_when_stopped} of {MAX_STEPS} is in a checkpoint" in story.stopped.stderr
    assert "Traceback" not in story.stopped.stderr


def test_a_checkout_without_stage_one_trains_on_existing_shards(story: Story) -> None:
    assert story.resumed.returncode == 0, story.resumed.stderr
    assert f"{MAX_STEPS} steps done" in story.resumed.stdout
    assert "to_q" in story.resumed.stdout  # what was adapted


def test_a_run_stopped_by_a_signal_and_resumed_is_bit_identical_to_an_uninterrupted_one(
    story: Story, configure: Configure, shards: Path, tmp_path: Path
) -> None:
    whole = train(configure(**SETTINGS), shards=shards, run=tmp_path / "whole")
    assert whole.checkpoint is not None
    expected = load_tensors(whole.checkpoint / "lora")
    found = load_tensors(story.run / "checkpoints" / whole.checkpoint.name / "lora")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    logs = [
        [{key: value for key, value in line.items() if key not in TIMES} for line in read_log(run)]
        for run in (story.run, whole.run)
    ]
    assert logs[0] == logs[1]


def test_two_processes_train_like_one_with_their_batches_together(
    configure: Configure, base_folder: Path, shards: Path, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "max_steps": 6, "checkpoint_every": 3, "ema_decay": 0.9, "gradient_accumulation": 2}
    (tmp_path / "small.toml").write_text(toml_of(base_folder, **settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "pipeline.py", "train"]
    command += ["--config", str(tmp_path / "small.toml"), "--shards", str(shards), "--out", str(tmp_path / "two")]
    two = subprocess.run(
        command, cwd=PROJECT_ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=280
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("trainable parameters") == 1  # only one of them speaks
    alone = configure(**{**settings, "batch_size": 4})
    one = train(alone, shards=shards, run=tmp_path / "one")
    halfway = tmp_path / "two/checkpoints/step-00000003"  # of two processes, taken up by one
    mixed = train(alone, shards=shards, run=tmp_path / "mixed", resume=str(halfway))
    assert one.checkpoint is not None and mixed.resumed_from == 3
    for kind in ("lora", "ema"):
        expected = load_tensors(one.checkpoint / kind)
        for run in ("two", "mixed"):
            found = load_tensors(tmp_path / run / "checkpoints" / one.checkpoint.name / kind)
            for name, tensor in expected.items():
                assert float((found[name] - tensor).norm()) <= 2e-3 * float(tensor.norm()), (run, name)
    losses = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
