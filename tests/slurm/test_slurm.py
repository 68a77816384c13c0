"""On a real Slurm: whatever interrupts the jobs, what comes of them is what one process makes, to the byte."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.conftest import (
    COUNT,
    PIPELINE,
    SECONDS,
    Cluster,
    adapter_of,
    remove_shard,
    shards_of,
    wait_for,
)
from tests.slurm.held import Held


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """Jobs that were submitted before the first test, to run side by side."""

    array: str
    limited: list[str]
    held_at_limit: Held
    killed: list[str]
    held_to_kill: Held
    low: list[str]
    held_to_preempt: Held
    step: str


@pytest.fixture(scope="session")
def begun(cluster: Cluster) -> Begun:
    folder = cluster.folder
    out = {name: folder / name for name in ("limited", "killed", "low")}
    held = {name: Held(path) for name, path in out.items()}

    def submit(name: str, *more: object) -> list[str]:
        return cluster.submit("precompute", "--num-tasks", 1, *cluster.inputs, "--out", out[name], *more)

    limited = submit("limited", "--set", "cluster.time=01:00:00", "--set", "cluster.batch_seconds=30")
    killed = submit("killed", "--train", folder / "never")
    low = submit("low", "--set", "cluster.partition=low", "--set", "cluster.gpus=1")
    command = shlex.join([*cluster.precompute, "--num-tasks", "4", "--out", str(folder / "array")])
    script = f"[ $SLURM_ARRAY_TASK_ID = 3 ] && exit 1; exec {command}"
    array = cluster.sbatch(folder / "array-%a.log", "--array=0-3", "--wrap", script)
    command = shlex.join([*cluster.precompute, "--out", str(folder / "step")])
    step = cluster.sbatch(folder / "step.log", "-n2", "--wrap", f"srun --label -n2 {command}")
    return Begun(
        array=array, limited=limited, held_at_limit=held["limited"], killed=killed, held_to_kill=held["killed"],
        low=low, held_to_preempt=held["low"], step=step,
    )  # fmt: skip


def test_a_warning_ahead_of_the_limit_ends_a_slice_and_the_next_goes_on(
    cluster: Cluster, begun: Begun, alone: Path
) -> None:
    begun.held_at_limit.wait(SECONDS)
    element = f"{begun.limited[0]}_0"
    cluster.limit(element, cluster.minutes(element) + 2)
    wait_for(begun.held_at_limit.was_asked_to_stop, "Slurm's signal")
    cluster.limit(element, 60)
    begun.held_at_limit.go_on()
    cluster.wait(*begun.limited)
    assert cluster.state(begun.limited[0]) == cluster.state(begun.limited[1]) == "COMPLETED"
    assert cluster.restarts(element) == 1
    assert shards_of(cluster.folder / "limited") == shards_of(alone)
    assert (cluster.folder / "limited" / "summary.json").exists()


def test_a_preempted_job_commits_ends_and_goes_on(cluster: Cluster, begun: Begun, alone: Path) -> None:
    begun.held_to_preempt.wait(SECONDS)
    preemptor = cluster.sbatch(Path(os.devnull), "--partition=main", "--gres=gpu:1", "--wrap", "true")
    wait_for(begun.held_to_preempt.was_asked_to_stop, "the preemption's signal")
    begun.held_to_preempt.go_on()
    cluster.wait(preemptor, *begun.low)
    assert cluster.state(begun.low[1]) == cluster.state(preemptor) == "COMPLETED"
    assert cluster.restarts(f"{begun.low[0]}_0") == 1
    assert shards_of(cluster.folder / "low") == shards_of(alone)


def test_after_a_kill_nothing_hangs_and_what_is_missing_can_be_submitted_with_its_chain(
    cluster: Cluster, begun: Begun, alone: Path
) -> None:
    killed, run = cluster.folder / "killed", cluster.folder / "run"
    os.kill(begun.held_to_kill.wait(SECONDS), signal.SIGKILL)
    cluster.wait(*begun.killed)
    assert [cluster.state(job) for job in begun.killed] == ["FAILED", "FAILED", "CANCELLED"]
    assert 0 < len(shards_of(killed)) < 2 * COUNT

    jobs = cluster.submit(
        "precompute", "--num-tasks", 2, "--missing", *cluster.inputs, "--out", killed, "--train", run
    )
    by_hand = cluster.folder / "by-hand"
    train = ["train", "--config", cluster.config, "--set", "shards.samples_per_shard=1", "--shards", alone]
    cluster.call(*PIPELINE, *train, "--out", by_hand)
    cluster.wait(*jobs)
    assert {cluster.state(job) for job in jobs} == {"COMPLETED"}
    assert shards_of(killed) == shards_of(alone)
    assert adapter_of(run) == adapter_of(by_hand)


def test_a_part_of_an_array_makes_its_own_share(cluster: Cluster, begun: Begun, alone: Path) -> None:
    folder = cluster.folder / "array"
    cluster.wait(begun.array)
    assert cluster.state(begun.array) == "COMPLETED FAILED"
    for index in (3, 7):  # of element 3, whether the others made them or not
        remove_shard(folder, index)
    command = shlex.join([*cluster.precompute, "--num-tasks", "4", "--out", str(folder)])
    again = cluster.sbatch(cluster.folder / "again.log", "--array=3", "--wrap", f"exec {command}")
    cluster.wait(again)
    assert cluster.state(again) == "COMPLETED"
    said = (cluster.folder / "again.log").read_text()
    assert "task 3 of 4" in said
    assert "2 shards written" in said
    assert shards_of(folder) == shards_of(alone)


def test_the_processes_of_a_step_share_the_work(cluster: Cluster, begun: Begun, alone: Path) -> None:
    cluster.wait(begun.step)
    assert cluster.state(begun.step) == "COMPLETED"
    said = (cluster.folder / "step.log").read_text()
    assert "committed it first" not in said
    assert shards_of(cluster.folder / "step") == shards_of(alone)


def test_ranks_of_a_step_train_as_those_of_a_launcher(cluster: Cluster, alone: Path) -> None:
    config, run, launched = cluster.config, cluster.folder / "ranks", cluster.folder / "launched"
    train = ["train", "--config", config, "--set", "train.batch_size=2", "--shards", alone]
    (job,) = cluster.submit(*train, "--set", "cluster.train_processes=2", "--out", run)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    cluster.call(*torchrun, "pipeline.py", *train, "--out", launched)
    cluster.wait(job)
    assert cluster.state(job) == "COMPLETED"
    assert adapter_of(run) == adapter_of(launched)
