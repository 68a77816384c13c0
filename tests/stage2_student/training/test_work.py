"""What a sample costs the UNet, and that the log says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import TrainConfig
from stage2_student.train import train
from stage2_student.training.phases import even_phases
from stage2_student.training.runlog import read_log
from stage2_student.training.work import UNetWork, count_work
from tests.stage2_student.conftest import Configure


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({"objective": "phased"}, (1, 0)),
        ({"objective": "phased", "states": "interpolated"}, (1, 0)),
        ({"objective": "phased", "draws_per_sample": 3}, (3, 0)),
        ({"objective": "unrolled"}, (4, 0)),
        ({"objective": "pcm"}, (1, 1)),
        ({"objective": "lcm"}, (1, 1)),
        ({"objective": "x0"}, (1, 0)),
    ],
)
def test_calls_are_those_that_the_objective_makes(settings: dict[str, object], calls: tuple[int, int]) -> None:
    train = TrainConfig(num_phases=4, **settings)  # type: ignore[arg-type]
    found = count_work(train, even_phases(8, 4))
    assert (found.with_gradient, found.without) == calls


@pytest.mark.parametrize(
    ("weights", "cost"),
    [
        ({"perceptual_weight": 0.1}, 0.9),
        ({"critic_weight": 0.1}, 0.9),
        ({"critic_weight": 0.1, "perceptual_weight": 1.0}, 1.5),
    ],
)
@pytest.mark.parametrize(("objective", "looks"), [("phased", 1), ("unrolled", 4)])
def test_what_the_base_sees_of_a_landed_state_is_paid_for(
    objective: str, looks: int, weights: dict[str, float], cost: float
) -> None:
    plain = TrainConfig(num_phases=4, objective=objective)  # type: ignore[arg-type]
    train = plain.replace(**weights)
    found, without = (count_work(one, even_phases(8, 4)) for one in (train, plain))
    assert (found.looks, without.looks) == (looks, 0)
    assert found.passes(train) == pytest.approx(without.passes(plain) + cost * looks)


def test_a_backward_pass_through_folded_adapters_costs_more() -> None:
    calls = UNetWork(with_gradient=2, without=1)
    assert calls.passes(TrainConfig()) == 6 and calls.passes(TrainConfig(fold_adapters=True)) == 7


def test_the_log_says_the_work_of_a_step(configure: Configure, shards: Path, tmp_path: Path) -> None:
    settings = {"perceptual_weight": 0.1, "batch_size": 2, "gradient_accumulation": 2, "max_steps": 2}
    train(configure(**settings), shards=shards, run=tmp_path / "run")
    assert read_log(tmp_path / "run")[-1]["unet_passes"] == pytest.approx((2.5 + 0.9) * 4)
