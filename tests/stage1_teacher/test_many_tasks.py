"""Eight real processes on one set, killed at random: the bytes are one process's, and little is done twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import MachineError, Stopped
from shards.files.names import TASKS_DIR
from shards.files.tasks import read_notes
from shards.looking.status import read_status
from stage1_teacher.precompute import precompute
from stage1_teacher.recording.recorder import Recorder
from stage1_teacher.recording.shard_maker import ShardMaker
from tests.stage1_teacher.small_teacher import load, write_prompts, write_teacher
from tests.stage1_teacher.torture import contents, kill_at_random

SETTINGS = ("shards.samples_per_shard=2", "precompute.solver_steps=2", "precompute.batch_size=2")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def test_processes_killed_at_random_lose_at_most_a_shard_each_and_end_with_one_process_bytes(
    config: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 24)
    precompute(load(config, *SETTINGS), tmp_path / "one", prompts=[prompts])
    report = kill_at_random(
        load(config, *SETTINGS), tmp_path / "many", prompts, tasks=8, kills=6, rng=random.Random(5)
    )
    assert report.kills == 6
    assert report.solved <= 24 + 2 * report.kills, report  # at most the shard in work of each
    many, one = contents(tmp_path / "many"), contents(tmp_path / "one")
    assert sorted(many) == sorted(one)
    assert [name for name in one if many[name] != one[name]] == []
    assert not read_notes(tmp_path / "many") and not list((tmp_path / "many" / TASKS_DIR).glob(".*"))
    assert read_status(tmp_path / "many").is_complete


def stop_after_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ShardMaker, "expect", stop)


def test_a_task_that_is_stopped_twice_on_a_shard_without_a_commit_says_what_to_change(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = write_prompts(tmp_path / "prompts.jsonl", 4), tmp_path / "out"
    settings = load(config, *SETTINGS[1:], "shards.samples_per_shard=4")
    with monkeypatch.context() as patch:
        stop_after_the_first_batch(patch)
        with pytest.raises(Stopped) as first:
            precompute(settings, out, prompts=[prompts])
        assert first.value.exit_code == 75
        for times in (2, 3):
            with pytest.raises(
                MachineError, match=rf"shard-000000\.tar: stopped {times} times .* longer"
            ) as again:
                precompute(settings, out, prompts=[prompts])
            assert again.value.exit_code == 74 and "samples_per_shard" in str(again.value)
    assert precompute(settings, out, prompts=[prompts]).shards_written == 1
    assert not list((out / ".work" / "stops").iterdir())


def test_a_stop_after_a_commit_is_no_endless_one_and_the_shards_time_is_logged(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    prompts, out = write_prompts(tmp_path / "prompts.jsonl", 12), tmp_path / "out"
    settings = load(config, *SETTINGS[1:], "shards.samples_per_shard=4")
    expect: Callable[..., None] = ShardMaker.expect

    def stop(self: ShardMaker, *arguments: object) -> None:
        expect(self, *arguments)
        if self._share.done.shards_written:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ShardMaker, "expect", stop)
        for committed in (1, 2):
            with pytest.raises(Stopped, match=f"{committed} of this task's 3 shards are committed"):
                precompute(settings, out, prompts=[prompts])
    assert "shard-000000.tar: 2 of 4 inputs in " in caplog.text and "the shard takes about" in caplog.text


def test_a_hundredth_task_that_starts_beside_others_makes_only_what_nobody_makes(
    config: Path, tmp_path: Path
) -> None:
    """`srun -n4` without any number: four processes that all think that they are task 0 of 1."""
    prompts, out = write_prompts(tmp_path / "prompts.jsonl", 8), tmp_path / "out"
    solved = tmp_path / "solved"
    context = multiprocessing.get_context("fork")

    def work() -> None:
        torch.set_num_threads(1)
        encode = Recorder.encode

        def counted(self: Recorder, inputs: list[object], where: str) -> object:
            with solved.open("ab") as file:
                file.write(b"x" * len(inputs))
            time.sleep(0.05)  # so that none is done before the others begin
            return encode(self, inputs, where)  # type: ignore[arg-type]

        Recorder.encode = counted  # type: ignore[assignment, method-assign]
        precompute(load(config, *SETTINGS), out, prompts=[prompts])
        sys.stdout.flush()

    tasks = [context.Process(target=work) for _ in range(4)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
        assert task.exitcode == 0
    assert read_status(out).is_complete and solved.stat().st_size == 8
