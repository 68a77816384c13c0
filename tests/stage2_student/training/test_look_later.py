"""Losses that are looked at later, as on a GPU, and what is never done after one that is not finite."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import DataError
from shards.reading.reader import ShardSet
from shards.records.members import ROLLOUT
from stage2_student.student.adapter import load_tensors
from stage2_student.train import make_accelerator, train
from stage2_student.training import prepare as prepare_module
from stage2_student.training.ancestry import Ancestry
from stage2_student.training.prepare import prepare
from stage2_student.training.runlog import read_log
from tests.shards.builders import write_over
from tests.stage2_student.conftest import Configure, write_shards
from tests.stage2_student.test_train import same, weights, without_times


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "looks_later", lambda device: True)


RUN: dict[str, Any] = {"max_steps": 7, "log_every": 3, "checkpoint_every": 2, "ema_decay": 0.9}


def test_looking_later_changes_rounding_alone_and_resumes_to_the_same_bits(
    configure: Configure, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rounding is that of a fused optimizer."""
    at_once = train(configure(**RUN), shards=shards, run=tmp_path / "at-once")
    monkeypatch.setattr(prepare_module, "looks_later", lambda device: True)
    whole = train(configure(**RUN), shards=shards, run=tmp_path / "whole")
    for line, expected in zip(without_times(whole.run), without_times(at_once.run), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    for name, tensor in weights(at_once).items():
        assert float((weights(whole)[name] - tensor).norm()) <= 1e-3 * float(tensor.norm())
    start = whole.run / "checkpoints/step-00000004"
    resumed = train(configure(**RUN), shards=shards, run=tmp_path / "resumed", resume=str(start))
    assert same(weights(resumed), weights(whole)) and same(weights(resumed, "ema"), weights(whole, "ema"))
    assert without_times(resumed.run) == without_times(whole.run)[1:]


@pytest.fixture
def damaged(base_folder: Path, tmp_path: Path) -> tuple[Path, str]:
    """Shards with NaN where the one phase of a sample of ten starts, under a good checksum; and its key."""
    shards = write_shards(tmp_path / "shards", base_folder / "base.safetensors", rollouts=1)
    return shards, write_over(shards, 1, 2, ROLLOUT, b"\x00\x7e" * 64)


def fail(configure: Configure, shards: Path, run: Path, **settings: Any) -> str:
    with pytest.raises(DataError, match="the loss is not finite") as raised:
        train(configure(**{"num_phases": 1, "log_every": 9, "max_steps": 9, **settings}), shards=shards, run=run)
    return str(raised.value)


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


@pytest.mark.parametrize("looked", [{}, {"log_every": 2}, {"checkpoint_every": 2}])
def test_the_first_step_and_its_samples_are_named_and_nothing_is_saved_or_logged_after_it(
    configure: Configure,
    damaged: tuple[Path, str],
    looked: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards, key = damaged
    expected = fail(configure, shards, tmp_path / "at-once", **looked)
    step = int(re.match(r"step (\d+):", expected)[1])  # type: ignore[index]
    assert f"on sample {key} (index 6); nothing" in expected
    monkeypatch.setattr(prepare_module, "looks_later", lambda device: True)
    assert fail(configure, shards, tmp_path / "later", **looked) == expected
    assert saved(tmp_path / "later") == saved(tmp_path / "at-once")
    assert all(int(name.removeprefix("step-")) < step for name in saved(tmp_path / "later"))
    logs = [without_times(tmp_path / name) for name in ("later", "at-once")]
    assert all(line == pytest.approx(expected, rel=1e-4) for line, expected in zip(*logs, strict=True))


@pytest.mark.usefixtures("later")
def test_from_a_step_that_is_not_finite_on_the_weights_stay_as_they_were(
    configure: Configure, damaged: tuple[Path, str], tmp_path: Path
) -> None:
    config, dataset = configure(num_phases=1, log_every=100, max_steps=100), ShardSet.open(damaged[0])
    trainer, _ = prepare(config, make_accelerator(config), dataset, tmp_path / "run", None, Ancestry())
    good, bad = (
        [batch for batch in itertools.islice(trainer.loader, 5) if (6 in batch.indices) == is_bad]
        for is_bad in (False, True)
    )

    def after(batches: Iterable[Any]) -> dict[str, torch.Tensor]:
        for batch in batches:
            trainer.optimizer_step(iter([batch]))
        states = trainer.learner.optimizer.state
        moments = {f"{n}/{m}": v for n, p in trainer.learner.parameters.items() for m, v in states[p].items()}
        return {name: value.detach().clone() for name, value in {**trainer.learner.parameters, **moments}.items()}

    before = after(good[:2])
    assert same(after([bad[0], *good]), before)  # the later, good steps too: nothing goes on from a bad one
    with pytest.raises(DataError, match="step 3: the loss is not finite"):
        trainer.save()
    assert saved(tmp_path / "run") == []


class Reads(TorchDispatchMode):
    """Notes what makes a program wait for its device: numbers that are read, shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in self.WAITING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize(
    "settings",
    [{}, {"fold_adapters": True, "gradient_accumulation": 2, "draws_per_sample": 2, "text_region_weight": 2.0}],
)
def test_a_step_between_two_log_lines_reads_nothing_from_the_device(
    configure: Configure, shards: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    config, dataset = configure(log_every=4, ema_decay=0.9, **settings), ShardSet.open(shards)
    trainer, _ = prepare(config, make_accelerator(config), dataset, tmp_path / "run", None, Ancestry())
    batches = iter(list(itertools.islice(trainer.loader, 4 * config.train.gradient_accumulation)))
    trainer.optimizer_step(batches)  # makes the optimizer's moments
    with Reads() as reads:
        assert trainer.optimizer_step(batches) is None
        assert trainer.optimizer_step(batches) is None
    assert reads.found == []
    assert trainer.optimizer_step(batches) is not None


def test_the_log_says_how_much_time_is_left(configure: Configure, shards: Path, tmp_path: Path) -> None:
    lines = read_log(train(configure(max_steps=4), shards=shards, run=tmp_path / "run").run)
    assert [line["seconds_left"] for line in lines] == [2 * lines[0]["step_seconds"], 0]
    assert "peak_memory_gib" not in lines[0]  # of a GPU


def test_checkpoints_of_before_go_on_with_a_fused_optimizer(
    configure: Configure, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"checkpoint_every": 2, "max_steps": 4, "model": {"channels_last": True}}
    whole = train(configure(**settings), shards=shards, run=tmp_path / "whole")
    monkeypatch.setattr(prepare_module, "looks_later", lambda device: True)
    start = whole.run / "checkpoints/step-00000002"
    resumed = train(configure(**settings), shards=shards, run=tmp_path / "resumed", resume=str(start))
    assert resumed.checkpoint is not None
    for name, tensor in load_tensors(resumed.checkpoint / "lora").items():
        assert float((weights(whole)[name] - tensor).norm()) <= 1e-3 * float(tensor.norm())
