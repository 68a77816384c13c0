"""Training as real processes: stopped by a signal, resumed without the teacher's code, and two side by side."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common.config import PROJECT_ROOT
from shards.records.members import ROLLOUT
from stage2_student.student.adapter import load_tensors
from stage2_student.student.checkpoint_folders import newest_checkpoint
from stage2_student.train import launched_alone, train
from stage2_student.training.runlog import read_log
from tests.shards.builders import write_over
from tests.stage2_student.conftest import Configure, write_shards

TIMES = {"samples_per_second", "step_seconds", "data_wait_seconds", "seconds_left"}
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
    "num_workers": 2,
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


def start(command: list[str], **variables: str) -> subprocess.Popen[str]:
    """Start a process that leads a group of its own."""
    return subprocess.Popen(
        command,
        cwd=PROJECT_ROOT,
        env={**environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(event: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not event() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def torchrun(*options: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return [
        *launcher,
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        *options,
        "pipeline.py",
        "train",
    ]


@pytest.fixture(scope="module")
def story(base_folder: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "small.toml").write_text(toml_of(base_folder, **SETTINGS))
    run, modules = folder / "run", folder / "modules.json"
    arguments = ["train", "--config", str(folder / "small.toml"), "--shards", str(shards), "--out", str(run)]

    code = RUN_AND_LIST_MODULES.format(modules=str(modules))
    command = [sys.executable, "-c", code, "pipeline.py", *arguments]
    process = start(command)
    wait_for(lambda: len(read_log(run)) >= 2, process)
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout`, a shell or a job system does: the workers get it too
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
    """Both start from another adapter and measure five held-out records, three of them in the first process."""
    settings = {**SETTINGS, "max_steps": 6, "checkpoint_every": 3, "ema_decay": 0.9, "gradient_accumulation": 2}
    held_out = write_shards(tmp_path / "held-out", base_folder / "base.safetensors", samples=5)
    ancestor = train(configure(max_steps=1), shards=shards, run=tmp_path / "ancestor").run
    (tmp_path / "small.toml").write_text(toml_of(base_folder, **settings))
    command = [sys.executable, "pipeline.py", "train", "--config", str(tmp_path / "small.toml")]
    command += ["--shards", str(shards), "--out", str(tmp_path / "two")]
    command += ["--from", str(ancestor), "--held-out", str(held_out)]
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    two = [start(command, **step, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("0", "1")]  # as srun does
    said = [process.communicate(timeout=280) for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    assert sum(out.count("trainable parameters") for out, _ in said) == 1  # only one of them speaks
    alone = configure(**{**settings, "batch_size": 4})
    one = train(alone, shards=shards, run=tmp_path / "one", ancestor=ancestor, held_out=held_out)
    halfway = tmp_path / "two/checkpoints/step-00000003"  # of two processes, taken up by one
    mixed = train(alone, shards=shards, run=tmp_path / "mixed", resume=str(halfway))
    assert one.checkpoint is not None and mixed.resumed_from == 3
    for kind in ("lora", "ema"):
        expected = load_tensors(one.checkpoint / kind)
        for run in ("two", "mixed"):
            found = load_tensors(tmp_path / run / "checkpoints" / one.checkpoint.name / kind)
            for name, tensor in expected.items():
                assert float((found[name] - tensor).norm()) <= 2e-3 * float(tensor.norm()), (run, name)
    for key in ("loss", "held_out_loss", "held_out_loss_ema"):
        one_, two_ = ([line[key] for line in read_log(tmp_path / name) if key in line] for name in ("one", "two"))
        assert one_ and one_ == pytest.approx(two_, rel=1e-4)


LOOK_LATER = """
import runpy, sys
from stage2_student.training import prepare
prepare.looks_later = lambda device: True  # as on a GPU
sys.argv = ["pipeline.py", *sys.argv[1:]]
runpy.run_path("pipeline.py", run_name="__main__")
"""


def run_two(
    arguments: list[str], *, until: Callable[[list[subprocess.Popen[str]]], None] = lambda processes: None
) -> tuple[list[int], list[str]]:
    """Train in two processes that look at losses later; returns their exit codes and what they said of errors."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    command = [sys.executable, "-c", LOOK_LATER, "train", *arguments]
    two = [start(command, **step, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("0", "1")]
    until(two)
    said = [process.communicate(timeout=280)[1] for process in two]
    return [process.returncode for process in two], said


def test_two_processes_with_folded_adapters_a_critic_and_losses_looked_at_later_train_like_one(
    configure: Configure, base_folder: Path, shards: Path, tmp_path: Path
) -> None:
    """DistributedDataParallel averages neither: no gradient passes through folded adapters, it has no critic."""
    settings = {**SETTINGS, "num_workers": 0, "max_steps": 4, "gradient_accumulation": 2, "ema_decay": 0.9}
    settings["critic_weight"] = 0.1
    (tmp_path / "small.toml").write_text(toml_of(base_folder, **settings, fold_adapters=True))
    arguments = ["--config", str(tmp_path / "small.toml"), "--shards", str(shards), "--out", str(tmp_path / "two")]
    codes, said = run_two(arguments)
    assert codes == [0, 0], said
    one = train(configure(**{**settings, "batch_size": 4}), shards=shards, run=tmp_path / "one")
    assert one.checkpoint is not None
    for kind in ("lora", "ema"):
        found = load_tensors(tmp_path / "two/checkpoints" / one.checkpoint.name / kind)
        for name, tensor in load_tensors(one.checkpoint / kind).items():
            assert float((found[name] - tensor).norm()) <= 2e-3 * float(tensor.norm()), name
    for key in ("loss", "critic_loss"):
        losses = [[line[key] for line in read_log(tmp_path / name)] for name in ("one", "two")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4), key


def test_two_processes_that_look_later_stop_in_the_same_step_and_name_the_same_bad_sample(
    base_folder: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.toml").write_text(
        toml_of(base_folder, **{**SETTINGS, "num_workers": 0, "max_steps": 10**6})
    )
    arguments = ["--config", str(tmp_path / "small.toml"), "--out", str(tmp_path / "run")]

    def stop_second(two: list[subprocess.Popen[str]]) -> None:
        wait_for(lambda: len(read_log(tmp_path / "run")) >= 2, two[0])
        two[1].send_signal(signal.SIGTERM)

    codes, said = run_two([*arguments, "--shards", str(shards)], until=stop_second)
    assert codes == [75, 75], said
    newest = newest_checkpoint(tmp_path / "run/checkpoints")
    assert newest is not None and all(f"step {int(newest.name[5:])} of" in errors for errors in said), said

    damaged = write_shards(tmp_path / "shards", base_folder / "base.safetensors", rollouts=1)
    key = write_over(damaged, 0, 1, ROLLOUT, b"\x00\x7e" * 64)
    bad = [*arguments[:3], str(tmp_path / "bad"), "--shards", str(damaged), "--set", "train.num_phases=1"]
    codes, said = run_two([*bad, "--set", "train.checkpoint_every=9", "--set", "train.log_every=9"])
    assert codes == [3, 3], said
    lines = [line for errors in said for line in errors.splitlines() if line.startswith("error: step")]
    assert len(lines) == 2 and lines[0] == lines[1] and f"sample {key} (index 1); nothing" in lines[0], said
    assert not list((tmp_path / "bad").glob("checkpoints/*"))


def test_torchrun_goes_on_after_a_killed_rank_and_stops_with_a_checkpoint(
    base_folder: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.toml").write_text(
        toml_of(base_folder, **{**SETTINGS, "max_steps": 10**6, "num_workers": 1})
    )
    run = tmp_path / "run"
    command = [*torchrun("--max-restarts", "1"), "--config", str(tmp_path / "small.toml"), "--resume", "auto"]
    command += ["--shards", str(shards), "--out", str(run), "--set", "train.checkpoint_every=2"]
    process = start(command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # else new ranks find the old ones' addresses
    wait_for(lambda: len(read_log(run)) >= 2, process)
    first = ranks_of(process)
    os.kill(first[0], signal.SIGKILL)  # the one that holds the lock, with a worker
    wait_for(lambda: not_of(first, process), process)
    steps = read_log(run)[-1]["step"]
    wait_for(lambda: read_log(run)[-1]["step"] >= steps + 4, process)
    os.killpg(process.pid, signal.SIGTERM)  # which torchrun passes on to ranks that had it already
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1, errors  # torchrun's own
    assert errors.count("is in a checkpoint: run the same command again") == 2, errors  # every rank ended with 75
    assert "another process is training" not in errors
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None and f"step {int(newest.name[5:])} of" in errors


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def not_of(first: list[int], process: subprocess.Popen[str]) -> bool:
    now = ranks_of(process)
    return len(now) == 2 and not set(now) & set(first)


def test_every_rank_names_the_samples_whose_loss_is_not_finite_and_no_others(
    base_folder: Path, tmp_path: Path
) -> None:
    shards = write_shards(tmp_path / "shards", base_folder / "base.safetensors", samples=4)
    key = write_over(shards, 0, 1, ROLLOUT, b"\x00\x7e" * 64)
    settings = {**SETTINGS, "num_workers": 0, "batch_size": 1}
    (tmp_path / "small.toml").write_text(toml_of(base_folder, **settings))
    command = [*torchrun(), "--config", str(tmp_path / "small.toml")]
    command += ["--shards", str(shards), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=PROJECT_ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=200
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: step")]
    assert 1 <= len(lines) <= 2, done.stderr  # torchrun may end one before it speaks
    assert all(f"is not finite on sample {key} (index 1); nothing" in line for line in lines), lines


def test_accelerate_that_starts_one_process_of_two_is_told_from_one_that_was_asked_for() -> None:
    for processes, alone in ((2, True), (1, False)):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        command += ["--no_python", sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=200)
        (environ,) = map(json.loads, done.stdout.splitlines())  # one process in both cases
        assert launched_alone(environ) == alone
