from __future__ import annotations

import dataclasses
import logging
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from common.errors import DataError
from stage2_student.evaluation.metrics import Estimate
from stage2_student.student.adapter import find_adapter, load_tensors, read_card
from stage2_student.watching.best import BestKeeper, require_own
from stage2_student.watching.checkpoints import find_candidates
from stage2_student.watching.log import Measured, read_measured
from tests.stage2_student.watching.conftest import Place


@pytest.fixture
def run(place: Place, tmp_path: Path) -> Path:
    copy = place.copy(tmp_path / "run")
    (copy / "watch").mkdir()
    return copy


@pytest.fixture
def lines(watched: Path) -> list[Measured]:
    return read_measured(watched / "watch")


def with_errors(lines: Sequence[Measured], errors: Mapping[int, float]) -> list[Measured]:
    """The checkpoints of some steps, as if they had these errors."""
    return [
        dataclasses.replace(
            line,
            endpoint_error=Estimate(value=errors[line.step], low=0.0, high=1.0, count=line.endpoint_error.count),
        )
        for line in lines
        if line.step in errors
    ]


def test_the_best_switches_to_a_lower_error_and_not_to_a_higher_one(run: Path, lines: list[Measured]) -> None:
    keeper, candidates = BestKeeper(run, run / "watch"), find_candidates(run)
    held = []
    for errors in ({2: 0.5}, {2: 0.5, 4: 0.3}, {2: 0.5, 4: 0.3, 6: 0.4}, {2: 0.5, 4: 0.3, 6: 0.3}):
        kept = keeper.keep(with_errors(lines, errors), candidates)
        assert kept is not None
        held.append(kept.step)
        assert read_card(find_adapter(run / "best")).step == kept.step
    assert held == [2, 4, 4, 6]  # of equals the latest
    assert (
        len(list((run / "watch").glob("best-*"))) == 2
    )  # what somebody may be reading stays until the next change
    assert not list(run.glob(".*.tmp")) and not list((run / "watch").glob(".*.tmp"))


def test_whoever_reads_while_it_switches_gets_a_whole_adapter(run: Path, lines: list[Measured]) -> None:
    keeper, candidates = BestKeeper(run, run / "watch"), find_candidates(run)
    orders: tuple[dict[int, float], ...] = ({2: 0.1, 4: 0.2}, {2: 0.2, 4: 0.1})
    expected = {step: load_tensors(run / f"checkpoints/step-{step:08d}/lora") for step in (2, 4)}
    keeper.keep(with_errors(lines, orders[0]), candidates)
    done, faults, seen = threading.Event(), [], set()

    def read() -> None:
        while not done.is_set():
            adapter = find_adapter(run / "best")
            step, found = read_card(adapter).step, load_tensors(adapter)
            seen.add(step)
            if any((found[name] != tensor).any() for name, tensor in expected[step].items()):
                faults.append(step)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(6):
        keeper.keep(with_errors(lines, orders[number % 2]), candidates)
    done.set()
    reader.join()
    assert not faults and seen


def test_a_best_checkpoint_that_is_gone_leaves_the_next_best_and_is_named_once(
    run: Path, lines: list[Measured], caplog: pytest.LogCaptureFixture
) -> None:
    keeper, candidates = BestKeeper(run, run / "watch"), find_candidates(run)
    shutil.rmtree(run / "checkpoints/step-00000004")  # after it was listed
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            kept = keeper.keep(with_errors(lines, {2: 0.5, 4: 0.3}), candidates)
    assert kept is not None and kept.step == 2
    assert caplog.text.count("step 4: its checkpoint is gone") == 1
    assert keeper.keep([], candidates) is None


def test_a_best_that_is_not_a_watcher_s_is_left_alone(run: Path) -> None:
    (run / "best").mkdir()
    with pytest.raises(DataError, match="not made by watch"):
        require_own(run)
