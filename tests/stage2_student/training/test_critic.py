"""The critic: heads on the frozen base's features, which learn beside the student."""

from __future__ import annotations

import shutil
from collections.abc import Callable
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
from common.regions import text_cells
from stage2_student.student.student import Student
from stage2_student.train import train
from stage2_student.training.critic import Critic
from stage2_student.training.losses import hinge_loss, mean_score
from stage2_student.training.objectives import Perceive
from stage2_student.training.phases import Draws
from stage2_student.training.runlog import read_log
from tests.stage2_student.conftest import Configure
from tests.stage2_student.test_train import same, weights, without_times
from tests.stage2_student.training.test_perceptual import conditioning, latents, perception

CHANNELS, SIZES = (8, 16), (8, 4)


def critic(**settings: Any) -> Critic:
    """One that has seen features of others."""
    one = Critic(CHANNELS, TrainConfig(critic_weight=1.0, **settings))
    one.score(features(98), features(99))
    one.optimizer.zero_grad()
    return one


def features(seed: int) -> list[Tensor]:
    """Of four samples."""
    random = torch.Generator().manual_seed(seed)
    pairs = zip(CHANNELS, SIZES, strict=True)
    return [torch.randn(4, channels, size, size, generator=random) for channels, size in pairs]


def shifted(seed: int, by: float = 0.6) -> list[Tensor]:
    return [level + by * torch.linspace(-1, 1, level.shape[1])[:, None, None] for level in features(seed)]


def test_the_hinge_is_0_at_the_margins_and_2_by_ignorance() -> None:
    def scores(value: float) -> list[Tensor]:
        return [torch.full((4, 1, size, size), float(value)) for size in SIZES]

    assert hinge_loss(scores(-1), scores(1)).tolist() == [0.0] * 4
    assert hinge_loss(scores(0), scores(0)).tolist() == [2.0] * 4
    assert hinge_loss(scores(3), scores(-5)).tolist() == [10.0] * 4
    assert hinge_loss(scores(-3), scores(5)).tolist() == [0.0] * 4
    assert mean_score([torch.full((2, 1, 8, 8), 6.0), torch.ones(2, 1, 4, 4)]).tolist() == [
        3.5,
        3.5,
    ]  # levels alike


def test_scores_teach_the_student_and_the_hinge_the_heads() -> None:
    one, landed, recorded = critic(), features(0), features(1)
    for level in (*landed, *recorded):
        level.requires_grad_()
    scores = one.score(landed, recorded)
    assert all(level.grad is None for level in landed)
    learnt = {
        name: parameter.grad.clone() for name, parameter in one.named().items() if parameter.grad is not None
    }
    by_hand = torch.autograd.grad(hinge_loss(one(landed), one(recorded)).mean(), list(one.parameters()))
    for found, expected in zip(learnt.values(), by_hand, strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scores, mean_score(one(landed)))
    scores.sum().backward()
    assert all(level.grad is not None and float(level.grad.abs().max()) > 0 for level in landed)
    assert all(level.grad is None for level in recorded)
    assert all(torch.equal(learnt[name], p.grad) for name, p in one.named().items() if p.grad is not None)


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = dict(critic().named())
    assert torch.equal(torch.get_rng_state(), state)  # whoever draws next is not disturbed
    torch.manual_seed(2)
    assert same(first, dict(critic().named())) and not same(first, dict(critic(seed=1).named()))


def test_what_all_states_share_does_not_count() -> None:
    plain, moved = critic(), Critic(CHANNELS, TrainConfig(critic_weight=1.0))

    def move(levels: list[Tensor]) -> list[Tensor]:
        return [100 + 0.05 * torch.arange(1.0, 1 + level.shape[1])[:, None, None] * level for level in levels]

    moved.score(move(features(98)), move(features(99)))
    for one, other in zip(plain(features(0)), moved(move(features(0))), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    before = moved.values()["critic.heads.0.0.mean"].clone()
    moved.score(features(0), features(1))  # once and for all
    assert torch.equal(moved.values()["critic.heads.0.0.mean"], before)


@pytest.mark.parametrize(("shift", "lowest", "highest"), [(0.6, 0.0, 0.4), (0.0, 1.5, 2.5)])
def test_it_learns_to_tell_what_can_be_told(shift: float, lowest: float, highest: float) -> None:
    one, accelerator = critic(), Accelerator(cpu=True)
    for step in range(60):
        one.score(shifted(2 * step, shift), features(2 * step + 1))
        one.step(accelerator)
    assert lowest <= one.facts(accelerator)["critic_loss"] <= highest
    with torch.no_grad():
        landed, recorded = (mean_score(one(levels)).mean() for levels in (shifted(998, shift), features(999)))
    assert not shift or float(landed) < -0.5 < 0.5 < float(recorded)


def test_a_step_is_as_long_as_its_learning_rate_says() -> None:
    changes = []
    for rate in (1e-3, 4e-3):
        one = critic(critic_learning_rate=rate)
        before = [parameter.detach().clone() for parameter in one.parameters()]
        one.score(features(0), features(1))
        one.step(Accelerator(cpu=True))
        changes.append(
            max(float((p - b).detach().abs().max()) for p, b in zip(one.parameters(), before, strict=True))
        )
    assert changes == pytest.approx([1e-3, 4e-3], rel=1e-2)  # Adam's first step


def test_a_gradient_that_is_not_finite_leaves_the_heads_finite() -> None:
    one, landed = critic(), features(0)
    landed[0][0] = torch.inf
    one.score(landed, features(1))
    one.step(Accelerator(cpu=True))
    assert all(bool(parameter.isfinite().all()) for parameter in one.parameters())


def eyes(student: Student, critic: Any, **settings: float) -> Perceive:
    """Looks at landed latents of three samples."""
    looking = perception(student, **settings)
    object.__setattr__(looking, "critic", critic)
    draws = Draws(rollout=torch.zeros(3).long(), state=torch.zeros(3).long(), position=torch.full((3,), 0.5))
    return looking.of_batch(conditioning(), draws, [(0, 4), (0, 5), (1, 6)], nullcontext)


def look_by(perceive: Perceive, landed: Tensor) -> Tensor:
    """Look at them beside recorded ones."""
    return perceive(landed, latents(2), torch.tensor([999, 499, 249]), torch.tensor([499, 249, CLEAN]))


@pytest.fixture
def looking(student: Student) -> Callable[..., Tensor]:
    """Looks with one critic, or without if it has no weight."""
    one = Critic(student.unet.feature_channels, TrainConfig(critic_weight=1.0))

    def look(landed: Tensor, **settings: float) -> Tensor:
        return look_by(eyes(student, one if settings["critic_weight"] else None, **settings), landed)

    return look


def gradient(look: Callable[..., Tensor], **settings: float) -> Tensor:
    landed = latents(1).requires_grad_()
    look(landed, **settings).sum().backward()
    assert landed.grad is not None
    return landed.grad


def test_the_critic_pulls_at_what_landed_and_the_loss_that_is_logged_leaves_it_out(
    looking: Callable[..., Tensor],
) -> None:
    alone, perceptual = (
        {"critic_weight": 1.0, "perceptual_weight": 0.0},
        {"critic_weight": 0.0, "perceptual_weight": 1.0},
    )
    both = gradient(looking, critic_weight=0.3, perceptual_weight=0.7)
    expected = 0.3 * gradient(looking, **alone) + 0.7 * gradient(looking, **perceptual)
    torch.testing.assert_close(both, expected, rtol=1e-3, atol=1e-6)
    assert looking(latents(1), **alone).tolist() == [0.0] * 3
    assert torch.equal(
        looking(latents(1), critic_weight=1.0, perceptual_weight=1.0), looking(latents(1), **perceptual)
    )
    with torch.no_grad():
        assert looking(latents(1), **alone).tolist() == [0.0] * 3


def test_descent_leads_to_higher_scores(student: Student) -> None:
    seen: list[Tensor] = []

    class Likes:
        """Scores by the first feature."""

        def score(self, landed: list[Tensor], recorded: list[Tensor]) -> Tensor:
            assert landed[0].requires_grad and not recorded[0].requires_grad
            seen.append(landed[0][:, 0].mean(dim=(1, 2)))
            return seen[-1]

    perceive = eyes(student, Likes(), critic_weight=0.5, perceptual_weight=0.0)

    def look(landed: Tensor) -> Tensor:
        return look_by(perceive, landed)

    pull = gradient(look)
    look((latents(1) - 0.1 * pull / pull.norm()).requires_grad_())
    assert bool((seen[1] > seen[0]).all())


def test_text_is_pulled_at_as_much_as_it_is_told(looking: Callable[..., Tensor]) -> None:
    inside = text_cells(conditioning().hints.positions, (8, 8)).bool().expand(-1, 6, -1, -1)
    assert inside.any() and not inside.all()
    usual = gradient(looking, critic_weight=1.0, perceptual_weight=0.0)
    for text in (0.0, 2.0):
        found = gradient(looking, critic_weight=1.0, perceptual_weight=0.0, critic_text_weight=text)
        torch.testing.assert_close(found[~inside], usual[~inside])
        torch.testing.assert_close(found[inside], text * usual[inside])


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
