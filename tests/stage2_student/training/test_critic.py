"""The critic: heads on the frozen base's features, which learn beside the student."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from common.config import TrainConfig
from common.ddim import CLEAN
from common.errors import DataError
from stage2_student.student.student import Student
from stage2_student.train import train
from stage2_student.training.critic import Critic
from stage2_student.training.losses import hinge_loss, mean_score, region_weights
from stage2_student.training.phases import Draws
from stage2_student.training.runlog import read_log
from tests.stage2_student.conftest import Configure
from tests.stage2_student.test_train import same, weights, without_times
from tests.stage2_student.training.test_perceptual import conditioning, latents, perception

CHANNELS, SIZES = (8, 16), (8, 4)
WHOLE = [torch.ones(4, 1, size, size) for size in SIZES]


def critic(**settings: Any) -> Critic:
    return Critic(CHANNELS, TrainConfig(critic_weight=1.0, **settings))


def features(seed: int) -> list[Tensor]:
    """Of four samples."""
    random = torch.Generator().manual_seed(seed)
    pairs = zip(CHANNELS, SIZES, strict=True)
    return [torch.randn(4, channels, size, size, generator=random) for channels, size in pairs]


def test_the_hinge_is_0_at_the_margins_and_2_by_ignorance() -> None:
    def scores(value: float) -> list[Tensor]:
        return [torch.full_like(weight, value) for weight in WHOLE]

    assert hinge_loss(scores(-1), scores(1), WHOLE).tolist() == [0.0] * 4
    assert hinge_loss(scores(0), scores(0), WHOLE).tolist() == [2.0] * 4
    assert hinge_loss(scores(3), scores(-5), WHOLE).tolist() == [10.0] * 4
    assert hinge_loss(scores(-3), scores(5), WHOLE).tolist() == [0.0] * 4


def test_levels_count_alike_and_text_as_much_as_it_is_told() -> None:
    positions = torch.zeros(1, 1, 8, 8)
    positions[..., :4] = 1  # the left half
    left = torch.zeros(1, 1, 8, 8)
    left[..., :4] = 6.0
    scores = [left, torch.full((1, 1, 4, 4), 1.0)]
    for text, expected in ((1.0, (3.0 + 1) / 2), (0.0, (0.0 + 1) / 2)):
        cells = [region_weights(positions, (8, 8), text), region_weights(positions, (4, 4), text)]
        torch.testing.assert_close(mean_score(scores, cells), torch.tensor([expected]))
    everywhere = [region_weights(torch.ones(1, 1, 8, 8), (size, size), 0.0) for size in SIZES]
    assert mean_score(scores, everywhere).tolist() == [0.0]  # text alone, of which nothing is to be said


def test_judging_teaches_the_student_and_learning_the_heads() -> None:
    one, landed, recorded = critic(), features(0), features(1)
    for level in landed:
        level.requires_grad_()
    judged = one.judge(landed, WHOLE)
    torch.testing.assert_close(judged, -mean_score(one(landed), WHOLE))
    judged.sum().backward()
    assert all(parameter.grad is None for parameter in one.parameters())
    assert all(level.grad is not None and float(level.grad.abs().max()) > 0 for level in landed)
    for level in landed:
        level.grad = None
    one.learn(landed, recorded, WHOLE)
    assert all(level.grad is None for level in landed)
    for parameter in one.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first, state = critic(), torch.get_rng_state()
    torch.manual_seed(2)
    assert same(dict(first.named()), dict(critic().named()))
    assert not same(dict(first.named()), dict(critic(seed=1).named()))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # whoever draws next is not disturbed


@pytest.mark.parametrize(("shift", "lowest", "highest"), [(0.6, 0.0, 0.4), (0.0, 1.5, 2.5)])
def test_it_learns_to_tell_what_can_be_told(shift: float, lowest: float, highest: float) -> None:
    one, accelerator = critic(), Accelerator(cpu=True)
    for step in range(60):
        landed = [
            level + shift * torch.linspace(-1, 1, level.shape[1])[:, None, None] for level in features(2 * step)
        ]
        one.learn(landed, features(2 * step + 1), WHOLE)
        one.step(accelerator)
    assert lowest <= one.facts(accelerator)["critic_loss"] <= highest


def test_a_gradient_that_is_not_finite_leaves_the_heads_finite() -> None:
    one, landed = critic(), features(0)
    landed[0][0] = torch.inf
    one.learn(landed, features(1), WHOLE)
    one.step(Accelerator(cpu=True))
    assert all(bool(parameter.isfinite().all()) for parameter in one.parameters())


def test_the_loss_of_a_landing_holds_minus_its_score_and_a_held_out_one_does_not(student: Student) -> None:
    one = Critic(student.unet.feature_channels, TrainConfig(critic_weight=1.0))
    draws = Draws(rollout=torch.zeros(3).long(), state=torch.zeros(3).long(), position=torch.full((3,), 0.5))
    t, t_end = torch.tensor([999, 499, 249]), torch.tensor([499, 249, CLEAN])

    def seen(**settings: float) -> Tensor:
        looking = perception(student, **settings)
        object.__setattr__(looking, "critic", one if settings["critic_weight"] else None)
        perceive = looking.of_batch(conditioning(), draws, [(0, 4), (0, 5), (1, 6)], nullcontext)
        return perceive(latents(1), latents(2), t, t_end)

    alone, perceptual = (
        seen(critic_weight=1.0, perceptual_weight=0.0),
        seen(critic_weight=0.0, perceptual_weight=1.0),
    )
    torch.testing.assert_close(seen(critic_weight=0.3, perceptual_weight=0.7), 0.3 * alone + 0.7 * perceptual)
    assert len(set(alone.tolist())) == 3
    with torch.no_grad():
        assert seen(critic_weight=1.0, perceptual_weight=0.0).tolist() == [0.0] * 3
        torch.testing.assert_close(seen(critic_weight=1.0, perceptual_weight=1.0), perceptual)


@pytest.mark.parametrize("more", [{}, {"objective": "unrolled", "gradient_accumulation": 2}], ids=str)
def test_a_resumed_run_is_the_same_bit_for_bit(
    configure: Configure, shards: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    """The heads and their moments too: the checkpoint falls between two log lines."""
    settings = {"critic_weight": 0.5, "checkpoint_every": 2, "max_steps": 5, "log_every": 3, **more}
    whole = train(configure(**settings), shards=shards, run=tmp_path / "whole")
    run = tmp_path / "killed"
    shutil.copytree(whole.run, run)
    for step in (4, 5):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")
    resumed = train(configure(**settings), shards=shards, run=run, resume="auto")
    assert resumed.resumed_from == 2 and same(weights(resumed), weights(whole))
    assert without_times(run) == without_times(whole.run)
    assert all(0 < line["critic_loss"] < 4 for line in read_log(run))
    plain = train(configure(**{**settings, "critic_weight": 0.0}), shards=shards, run=tmp_path / "plain")
    assert not same(weights(plain), weights(whole))
    with pytest.raises(DataError, match=r"train\.critic_weight"):
        train(configure(**{**settings, "max_steps": 6}), shards=shards, run=plain.run, resume="auto")
