"""The objective that walks the student's own solve, with gradients through all of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from common.config import TrainConfig
from common.ddim import CLEAN, integrate, trailing_grid
from common.schedule import alphas_at, phase_target_eps, trailing_timesteps
from stage2_student.student.adapter import read_card
from stage2_student.train import train
from stage2_student.training.objectives import LossSettings, loss_of, phased_loss, unrolled_loss
from stage2_student.training.phases import upstream_phases
from stage2_student.training.runlog import read_log
from tests.stage2_student.conftest import Configure, write_shards
from tests.stage2_student.test_train import same, weights
from tests.stage2_student.training.test_fast_steps import (
    TOLERANCE,
    WRITENET,
    difference,
    losses_and_gradients,
    make_trainer,
)
from tests.stage2_student.training.test_losses import ALPHAS, STATES, draws_at, settings_for, solves_for


def linear(slopes: dict[int, Tensor]) -> nn.Module:
    """A student whose eps is z times a slope of its own at each t."""

    class Linear(nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return slopes[int(t[0])] * z

    return Linear()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss_and_its_gradient_are_those_of_a_hand_computation(weight: float) -> None:
    """y_1 = p z, y_2 = q y_1 for a linear student: every figure is a formula of two slopes."""
    rollouts = solves_for(1)
    settings = settings_for(2, objective="unrolled", loss="l2", unrolled_phase_weight=weight)
    slopes = {999: torch.tensor(0.9, requires_grad=True), 499: torch.tensor(0.4, requires_grad=True)}
    loss = unrolled_loss(rollouts, draws_at([0]), linear(slopes), linear(slopes), settings)
    loss.sum().backward()

    z0, z1, x0 = (rollouts.states[:, index].double() for index in (0, 4, 8))
    a0, a1 = ALPHAS[999].double(), ALPHAS[499].double()
    s0, s1 = (1 - a0).sqrt(), (1 - a1).sqrt()
    f0, f1 = s1 - s0 * (a1 / a0).sqrt(), -s1 / a1.sqrt()  # how far eps moves the landing
    p, q = (a1 / a0).sqrt() + 0.9 * f0, 1 / a1.sqrt() + 0.4 * f1
    y1, y2 = p * z0, q * p * z0
    of_first, of_last = (y1 - z1) / f0, (y2 - x0) / f1  # landing errors as errors of eps
    torch.testing.assert_close(loss.double(), of_last**2 + weight * of_first**2, rtol=1e-3, atol=1e-3)
    through_the_chain = (2 * of_last / f1 * q * f0 * z0).sum()
    own = (2 * weight * of_first * z0).sum()
    torch.testing.assert_close(slopes[999].grad.double(), through_the_chain + own, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(slopes[499].grad.double(), (2 * of_last * y1).sum(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("loss", ["huber", "l2", "landing"])
def test_one_phase_is_the_phased_objective_bit_for_bit(loss: str) -> None:
    rollouts, slopes = solves_for(), {999: torch.tensor(0.3)}
    unrolled = settings_for(1, objective="unrolled", loss=loss)
    found = loss_of(unrolled.train)(rollouts, draws_at([0] * 3), linear(slopes), linear(slopes), unrolled)
    expected = phased_loss(rollouts, draws_at([0] * 3), linear(slopes), linear(slopes), settings_for(1, loss=loss))
    assert torch.equal(found, expected)


def test_the_student_is_called_at_the_states_of_its_own_solve() -> None:
    rollouts, settings = solves_for(), settings_for(4, objective="unrolled")
    slopes = {t: torch.tensor(0.2 + t / 2000) for t in trailing_timesteps(4).tolist()}
    called, sampled = [], []

    def predict(z: Tensor, t: Tensor) -> Tensor:
        called.append(z)
        return linear(slopes)(z, t)

    unrolled_loss(rollouts, draws_at([6, 2, 4]), predict, predict, settings)  # whatever state was drawn
    integrate(linear(slopes), rollouts.states[:, 0], trailing_grid(4), lambda _, z: [sampled.append(z), z][1])
    assert len(called) == 4 and len(sampled) == 5
    for own, expected in zip(called, sampled, strict=False):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("grid", ["trailing", "upstream"])
def test_a_student_that_follows_the_teacher_has_no_loss_and_one_that_does_not_pays_for_each_landing(
    grid: str,
) -> None:
    rollouts = solves_for()
    settings = settings_for(4, objective="unrolled", grid=grid, loss="landing", unrolled_phase_weight=3.0)
    boundaries, labels = (0, 2, 4, 6, 8), (999, 749, 499, 249, CLEAN)
    if grid == "upstream":  # one crossing less, at its own labels
        phases = upstream_phases(4, trailing_timesteps(STATES).tolist())
        settings = LossSettings(train=settings.train, phases=phases, alphas_cumprod=ALPHAS)
        boundaries, labels = (0, 4, 6, 8), (751, 501, 251, 1)

    def follow(z: Tensor, t: Tensor, off: float = 0.0) -> Tensor:
        phase = labels.index(int(t[0]))
        z_end = rollouts.states[:, boundaries[phase + 1]] + off
        a_end = alphas_at(ALPHAS, torch.tensor(labels[phase + 1]))
        return phase_target_eps(z, z_end, alphas_at(ALPHAS, t), a_end)

    draws = draws_at([0] * 3)
    assert unrolled_loss(rollouts, draws, follow, follow, settings).abs().max() < 1e-4
    off = unrolled_loss(rollouts, draws, lambda z, t: follow(z, t, 0.5), follow, settings)
    torch.testing.assert_close(off, torch.full_like(off, 0.25 * (1 + 3)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"states": "all"}, r"states: received 'all', expected starts with objective unrolled: it walks a whole"),
        ({"draws_per_sample": 2}, r"draws_per_sample: received 2, expected 1 with objective unrolled"),
        ({"unrolled_phase_weight": -1.0}, r"unrolled_phase_weight"),
    ],
)
def test_what_does_not_go_with_it_is_refused_with_the_reason(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(objective="unrolled", **settings)  # type: ignore[arg-type]


def test_a_run_learns_and_goes_on_after_a_stop_to_the_same_bits(
    configure: Configure, shards: Path, base_folder: Path, tmp_path: Path
) -> None:
    held_out = write_shards(tmp_path / "held-out", base_folder / "base.safetensors", samples=3)
    settings = {"objective": "unrolled", "loss": "l2", "learning_rate": 2e-2, "batch_size": 5, "log_every": 4}
    config = configure(**settings, checkpoint_every=8, max_steps=12, held_out_every=12)
    whole = train(config, shards=shards, run=tmp_path / "whole", held_out=held_out)
    log = read_log(whole.run)
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < 0.95 * losses[0]
    assert [line["step"] for line in log if "held_out_loss" in line] == [12]
    card = read_card(whole.run / "checkpoints/step-00000012/lora")
    assert (card.objective, card.sampler, card.timesteps) == ("unrolled", "ddim", (999, 499))

    first = configure(**settings, checkpoint_every=8, max_steps=8)
    train(first, shards=shards, run=tmp_path / "parts")
    resumed = train(config, shards=shards, run=tmp_path / "parts", resume="auto")
    assert resumed.resumed_from == 8 and same(weights(resumed), weights(whole))


FAST = {
    "folded": {"fold_adapters": True},
    "folded, checkpointing": {"fold_adapters": True, "gradient_checkpointing": True},
}


def test_folded_adapters_and_recomputed_activations_give_the_same_gradients(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    """Several calls before one backward pass: what each adds to a weight's gradient must be in the adapter's."""
    plain = {"objective": "unrolled", "lora": WRITENET}
    expected = losses_and_gradients(make_trainer(configure, shards, tmp_path / "plain", plain), micro_batches=1)
    for name, settings in FAST.items():
        trainer = make_trainer(configure, shards, tmp_path / name, {**plain, **settings})
        assert difference(losses_and_gradients(trainer, micro_batches=1), expected) < TOLERANCE, name


@pytest.fixture
def process_group() -> Iterator[None]:
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_training_reduces_once_however_often_the_student_was_called(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    plain = {"objective": "unrolled"}
    expected = losses_and_gradients(make_trainer(configure, shards, tmp_path / "plain", plain), micro_batches=1)
    for checkpointing in (False, True):
        settings = {**plain, "gradient_checkpointing": checkpointing}
        trainer = make_trainer(configure, shards, tmp_path / f"{checkpointing}", settings)
        trainer.model = DistributedDataParallel(trainer.student)
        assert difference(losses_and_gradients(trainer, micro_batches=1), expected) < TOLERANCE
