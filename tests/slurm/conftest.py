"""One Slurm for all tests of this folder, and a set and a run that no cluster made to compare with."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.config import PROJECT_ROOT
from tests.slurm import daemons
from tests.stage1_teacher.small_teacher import write_prompts, write_teacher

COUNT = 8
"""Inputs, and shards: one each."""
SETTINGS = """
[cluster]
gpus = 0
cpus = 1
memory = "1G"
time = "02:00:00"
batch_seconds = 1
[train]
num_phases = 2
max_steps = 3
batch_size = 4
num_workers = 0
checkpoint_every = 1
[lora]
rank = 2
alpha = 2
"""
SECONDS = 600.0
"""The longest that anything is waited for; on an idle machine a twentieth of it is enough."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.slurm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A Slurm that runs, and what there is to work on."""

    folder: Path
    environment: dict[str, str]
    config: Path
    prompts: Path

    @property
    def precompute(self) -> list[str]:
        """The command without --out, as a user types it."""
        return [*PIPELINE, "precompute", *self.inputs]

    @property
    def inputs(self) -> list[str]:
        """Options of precompute."""
        return [
            "--config",
            str(self.config),
            "--set",
            "shards.samples_per_shard=1",
            "--prompts",
            str(self.prompts),
        ]

    def call(self, *command: object) -> str:
        """Run a command that must succeed; returns what it prints."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, cwd=PROJECT_ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def submit(self, *options: object) -> list[str]:
        """Call `pipeline.py submit`; returns the ids of the jobs."""
        said = self.call(*PIPELINE, "submit", *options)
        return [line.partition(": job ")[2].split(",")[0].split(";")[0] for line in said.splitlines()]

    def sbatch(self, log: Path, *options: object) -> str:
        """Submit what a user has written; returns the job's id."""
        return self.call("sbatch", "--parsable", "--open-mode=append", "-o", log, *options).strip()

    def state(self, job: str) -> str:
        """Return the job's state, or those of an array's elements."""
        done = subprocess.run(
            ["squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%T"],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return " ".join(sorted(set(done.stdout.split())))

    def restarts(self, job: str) -> int:
        """Return how often Slurm has started the job again."""
        return int(self._shown(job, "Restarts"))

    def minutes(self, job: str) -> int:
        """Return the whole minutes that a job has run for."""
        hours, minutes, _seconds = self._shown(job, "RunTime").split(":")
        return int(hours) * 60 + int(minutes)

    def limit(self, job: str, minutes: int) -> None:
        """Give a job another limit, as soon as Slurm has time for it: not while one of its slices is ending."""
        command = ["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}"]
        wait_for(
            lambda: (
                subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode == 0
            ),
            f"another limit of job {job}",
        )

    def wait(self, *jobs: str) -> None:
        """Wait until jobs have ended, whichever way."""
        for job in jobs:
            wait_for(functools.partial(self._has_ended, job), f"the end of job {job}")

    def _has_ended(self, job: str) -> bool:
        states = set(self.state(job).split())
        return bool(states) and states <= ENDED

    def _shown(self, job: str, key: str) -> str:
        words = self.call("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{key}="))


ENDED = {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "PREEMPTED"}
PIPELINE = [sys.executable, "pipeline.py"]


def wait_for(event: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not event():
        assert time.monotonic() < deadline, f"waited {SECONDS:g} s for {what}"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if why := daemons.missing():
        assert "REQUIRE_SLURM" not in os.environ, why
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="slurm-test-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # munged is not root
        config = write_teacher(folder)
        config.write_text(config.read_text() + SETTINGS)
        prompts = write_prompts(folder / "prompts.jsonl", COUNT)
        (folder / "slurm").mkdir()
        with daemons.running(folder / "slurm") as environment:
            yield Cluster(
                folder=folder, environment={**environment, "OMP_NUM_THREADS": "1"}, config=config, prompts=prompts
            )


@pytest.fixture(scope="session")
def alone(cluster: Cluster) -> Path:
    """A set that one process made."""
    out = cluster.folder / "alone"
    cluster.call(*cluster.precompute, "--out", out)
    return out


def shards_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every shard and sidecar."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def adapter_of(run: Path) -> dict[str, bytes]:
    """Return the trained weights, by file."""
    folder = run / "checkpoints" / "step-00000003" / "lora"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert found
    return found


def remove_shard(folder: Path, index: int) -> None:
    for path in folder.glob(f"shard-{index:06d}.*"):
        path.unlink()
