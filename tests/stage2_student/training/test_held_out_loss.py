"""The loss on records that are not trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from common.errors import DataError, UsageError
from common.schedule import make_alphas_cumprod
from shards.reading.reader import ShardSet
from shards.records.batch import collate
from stage2_student.student.sample import LoadedStudent
from stage2_student.train import TrainResult, train
from stage2_student.training.losses import per_sample
from stage2_student.training.objectives import LossSettings, phased_loss, select_rollout
from stage2_student.training.phases import draw, even_phases
from stage2_student.training.runlog import read_log
from tests.stage2_student.conftest import Configure, write_shards
from tests.stage2_student.test_train import same, weights, without_times

SETTINGS = {"max_steps": 5, "log_every": 2, "checkpoint_every": 3, "ema_decay": 0.9, "held_out_every": 2}


@pytest.fixture(scope="module")
def held_out(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven records of one rollout each, where those that are trained on have two."""
    folder = tmp_path_factory.mktemp("held-out")
    return write_shards(folder, base_folder / "base.safetensors", samples=7, rollouts=1)


def measured(run: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line for line in read_log(run) if "held_out_loss" in line}


def by_hand(configure: Configure, result: TrainResult, held_out: Path, kind: str) -> float:
    config, shards = configure(**SETTINGS), ShardSet.open(held_out)
    assert result.checkpoint is not None
    student = LoadedStudent.load(config, result.checkpoint / kind).student
    batch, phases = collate([shards[index] for index in range(len(shards))]), even_phases(4, 2)
    draws = draw([(0, i) for i in range(7)], seed=0, num_rollouts=2, phases=phases, starts_only=True)
    only = torch.zeros(7, dtype=torch.long)  # a record's second rollout is its first
    rollouts = select_rollout(batch.rollout_latents, batch.rollout_timesteps, None, None, only)
    settings = LossSettings(train=config.train, phases=phases, alphas_cumprod=make_alphas_cumprod())
    conditioning = batch.conditioning.to("cpu", torch.float32)

    @torch.no_grad()
    def predict(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return student(z, t, conditioning)

    return float(per_sample(phased_loss(rollouts, draws, predict, predict, settings)).mean())


def test_the_held_out_loss_is_logged_and_leaves_no_trace_in_what_is_trained(
    configure: Configure, shards: Path, held_out: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    plain = train(configure(**SETTINGS), shards=shards, run=tmp_path / "plain")
    with_it = train(
        configure(**SETTINGS), shards=shards, run=tmp_path / "with", held_out=held_out, announce=lines.append
    )
    assert "loss of 7 held-out samples every 2 steps" in lines[-1]
    for kind in ("lora", "ema"):
        assert same(weights(with_it, kind), weights(plain, kind))
    for checkpoint in ("step-00000003", "step-00000005"):
        a, b = (run.run / "checkpoints" / checkpoint / "state.json" for run in (plain, with_it))
        assert a.read_bytes() == b.read_bytes()
    assert without_times(plain.run) == [line for line in without_times(with_it.run) if "loss" in line]
    found = measured(with_it.run)
    assert list(found) == [2, 4, 5] and len({line["held_out_loss"] for line in found.values()}) == 3
    assert found[5]["held_out_loss"] == pytest.approx(by_hand(configure, with_it, held_out, "lora"), rel=1e-4)
    assert found[5]["held_out_loss_ema"] == pytest.approx(by_hand(configure, with_it, held_out, "ema"), rel=1e-4)

    killed = tmp_path / "killed"
    shutil.copytree(with_it.run, killed)
    shutil.rmtree(killed / "checkpoints/step-00000005")
    train(configure(**SETTINGS), shards=shards, run=killed, resume="auto", held_out=held_out)
    assert measured(killed) == found


def test_objectives_with_predictions_and_averages_as_targets_are_measured_too(
    configure: Configure, base_folder: Path, noised_shards: Path, shards: Path, held_out: Path, tmp_path: Path
) -> None:
    base = base_folder / "base.safetensors"
    noised = write_shards(tmp_path / "noised", base, samples=3, predictions=True, source="noised", rollouts=1)
    lcm = configure(objective="lcm", max_steps=1)
    result = train(lcm, shards=noised_shards, run=tmp_path / "lcm", held_out=noised)
    assert measured(result.run)[1]["held_out_loss"] > 0
    pcm = configure(objective="pcm", max_steps=1, ema_decay=0.9, pcm_target="ema", held_out_samples=2)
    result = train(pcm, shards=shards, run=tmp_path / "pcm", held_out=held_out)
    assert measured(result.run)[1].keys() == {"step", "held_out_loss"}


def test_a_set_that_does_not_fit_is_refused(
    configure: Configure, shards: Path, base_folder: Path, tmp_path: Path
) -> None:
    base = base_folder / "base.safetensors"
    other = write_shards(tmp_path / "other", base, samples=2, base_fingerprint="f" * 64)
    noised = write_shards(tmp_path / "noised", base, samples=2, predictions=True, source="noised")
    for location, error, message in (
        (shards, UsageError, "is the set that is trained on"),
        (other, DataError, "recorded on the base ffffffffffff"),
        (noised, UsageError, 'are of source "noised", expected "rollout"'),
    ):
        with pytest.raises(error, match=message):
            train(configure(), shards=shards, run=tmp_path / "run", held_out=location)
    assert not (tmp_path / "run" / "checkpoints").exists()
