"""A training run of three checkpoints, and a held-out set for it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from common.config import Config, load_config
from stage2_student.train import train
from stage2_student.watch import WatchResult, watch
from tests.stage2_student.conftest import write_shards
from tests.stage2_student.test_processes import toml_of

RECORDS = 3
STEPS = (2, 4, 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What watching needs."""

    toml: Path
    config: Config
    shards: Path
    """Trained on."""
    held_out: Path
    run: Path
    """Trained; only its last checkpoint is whole."""

    def copy(self, to: Path) -> Path:
        """Copy the run."""
        return Path(shutil.copytree(self.run, to, symlinks=True))

    def watch(self, run: Path, *, once: bool = True, records: int = RECORDS) -> WatchResult:
        """Watch a run."""
        return watch(self.config, run, held_out=str(self.held_out), records=records, once=once, poll_seconds=0.1)

    def train(self, run: Path, steps: int) -> None:
        """Train a run, or go on with one."""
        changed = self.config.train.replace(max_steps=steps)
        train(self.config.replace(train=changed), shards=self.shards, run=run, resume="auto")
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def place(base_folder: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("watching")
    held_out = write_shards(folder / "held-out", base_folder / "base.safetensors", samples=RECORDS + 1, rollouts=1)
    settings = {
        "num_phases": 2,
        "max_steps": STEPS[-1],
        "batch_size": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "num_workers": 0,
        "log_every": 2,
        "checkpoint_every": 2,
        "keep_checkpoints": 1,
    }
    (folder / "small.toml").write_text(toml_of(base_folder, **settings))
    config = load_config(folder / "small.toml", ())
    made = Place(
        toml=folder / "small.toml", config=config, shards=shards, held_out=held_out, run=folder / "trained"
    )
    made.train(made.run, STEPS[-1])
    return made


@pytest.fixture(scope="session")
def watched(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run that was watched to its end; not to be changed."""
    run = place.copy(tmp_path_factory.mktemp("watched") / "run")
    place.watch(run)
    return run
