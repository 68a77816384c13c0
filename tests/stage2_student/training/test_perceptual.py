"""The perceptual loss: what the frozen base sees in a landed state and in the teacher's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from common.anytext2.conditioning import ConditioningBatch
from common.anytext2.config import load_network_config
from common.anytext2.unet import UNet
from common.anytext2.writenet import WriteNet
from common.config import TrainConfig
from common.ddim import CLEAN
from common.schedule import alphas_at, ddim_step
from stage2_student.student.base_features import BaseFeatures
from stage2_student.student.student import Student
from stage2_student.train import train
from stage2_student.training.losses import feature_distance, per_sample, region_weights
from stage2_student.training.objectives import phased_loss
from stage2_student.training.perception import Perception
from stage2_student.training.phases import Draws
from tests.stage2_student.conftest import NETWORK, Configure, make_record, stack
from tests.stage2_student.test_train import same, weights
from tests.stage2_student.training.test_fast_steps import make_trainer
from tests.stage2_student.training.test_losses import ALPHAS, draws_at, settings_for, solves_for


def conditioning() -> ConditioningBatch:
    """Of three images; the first one's caption is longer, so that the others are padded."""
    return stack([make_record(index) for index in range(3)]).to("cpu", torch.float32)


def latents(seed: int = 0) -> Tensor:
    return torch.randn(3, 6, 8, 8, generator=torch.Generator().manual_seed(seed))


def seen_on_the_way(student: Student, z: Tensor, t: Tensor, given: ConditioningBatch) -> list[Tensor]:
    """What the blocks of a whole call give, WriteNet's residuals included."""
    found: list[Tensor] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    blocks = [*student.unet.down_blocks, student.unet.mid_block]
    handles = [block.register_forward_hook(note) for block in blocks]
    student(z, t, given)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("settings", [{}, {"fold_adapters": True}, {"gradient_checkpointing": True}], ids=str)
def test_features_are_the_bases_whatever_the_adapters_say(
    configure: Configure, shards: Path, student: Student, tmp_path: Path, settings: dict[str, Any]
) -> None:
    trainer = make_trainer(configure, shards, tmp_path / "run", settings)
    z, t, given = latents().requires_grad_(), torch.tensor([999, 400, 0]), conditioning()
    assert given.context_mask is not None
    features = BaseFeatures(trainer.student.unet, trainer.learner.folded)
    found = features(z, t, given.image_context, given.context_mask)
    expected = seen_on_the_way(student.eval(), z, t, given)  # a base that never had adapters
    adapted = seen_on_the_way(trainer.student, z, t, given)
    assert len(found) == len(expected) == len(adapted) == 3
    for one, other, wrong in zip(found, expected, adapted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert float((one - wrong).detach().abs().max()) > 1e-3
    for parameter in trainer.learner.parameters.values():
        parameter.grad = None
    sum(level.square().mean() for level in features(z, t, given.image_context, given.context_mask)).backward()
    assert all(parameter.grad is None for parameter in trainer.student.parameters())
    (gradient,) = torch.autograd.grad(sum(level.square().mean() for level in found), z)
    (of_base,) = torch.autograd.grad(sum(level.square().mean() for level in expected), z)
    torch.testing.assert_close(gradient, of_base, rtol=1e-4, atol=1e-7)


def test_a_level_without_attention_is_seen_too() -> None:
    """As the deepest one of the released network."""
    network = NETWORK.replace("attention_resolutions = [1, 2]", "attention_resolutions = [1]").replace(
        "attnx_levels = [1]", "attnx_levels = [0]"
    )
    with TemporaryDirectory() as folder:
        (Path(folder) / "network.toml").write_text(network)
        config = load_network_config(Path(folder) / "network.toml")
    torch.manual_seed(0)
    student, given = Student(UNet(config), WriteNet(config)).eval(), conditioning()
    assert not hasattr(student.unet.down_blocks[1], "has_cross_attention")
    t = torch.tensor([999, 400, 0])
    found = student.unet.features(latents(), t, given.image_context, context_mask=given.context_mask)
    for one, other in zip(found, seen_on_the_way(student, latents(), t, given), strict=True):
        torch.testing.assert_close(one, other)


def test_the_distance_is_relative_and_a_mean_over_levels() -> None:
    near, far = torch.full((2, 3, 4, 4), 2.0), torch.full((2, 5, 2, 2), 10.0)
    whole = [torch.ones(2, 1, 4, 4), torch.ones(2, 1, 2, 2)]
    found = feature_distance([near + 1, far + 1], [near, far], whole)
    torch.testing.assert_close(found, torch.full((2,), (1 / 4 + 1 / 100) / 2))
    assert feature_distance([near, far], [near, far], whole).tolist() == [0.0, 0.0]


def test_text_counts_as_much_as_it_is_told() -> None:
    positions = torch.zeros(1, 1, 8, 8)
    positions[..., :4] = 1  # the left half
    target, found = torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    found[..., 0] += 1  # a column of four, inside of the text
    for weight, expected in ((1.0, 4 / 16), (3.0, 3 * 4 / (3 * 8 + 8))):
        weights = region_weights(positions, (4, 4), weight)
        torch.testing.assert_close(feature_distance([found], [target], [weights]), torch.tensor([expected]))


def perception(student: Student, **train: Any) -> Perception:
    settings = TrainConfig(**{"perceptual_weight": 1.0, **train})
    return Perception(features=BaseFeatures(student.unet), train=settings, alphas_cumprod=ALPHAS)


def test_equal_states_look_equal_and_noise_is_keyed_by_the_sample(student: Student) -> None:
    draws = Draws(
        rollout=torch.zeros(3).long(), state=torch.zeros(3).long(), position=torch.tensor([0.0, 0.5, 0.9])
    )
    t, t_end = torch.tensor([999, 499, 249]), torch.tensor([499, 249, CLEAN])

    def looks(keys: list[tuple[int, int]], landed: Tensor) -> Tensor:
        perceive = perception(student).of_batch(conditioning(), draws, keys, nullcontext)
        return perceive(landed, latents(), t, t_end)

    keys = [(0, 4), (0, 5), (1, 6)]
    assert looks(keys, latents()).tolist() == [0.0] * 3
    other = latents() + 0.3 * latents(1)
    first, again, elsewhere = looks(keys, other), looks(keys, other), looks([(1, 4), *keys[1:]], other)
    assert bool((first > 0).all()) and torch.equal(first, again)
    assert first[0] != elsewhere[0] and torch.equal(first[1:], elsewhere[1:])


def test_each_row_is_seen_with_its_own_image_and_noise(student: Student) -> None:
    """Two draws of each of three images, against one row at a time."""
    state, position = torch.zeros(6).long(), torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 0.99])
    t, t_end = torch.tensor([999, 499] * 3), torch.tensor([499, CLEAN] * 3)
    landed, target = torch.cat([latents(2), latents(3)]), torch.cat([latents(4), latents(5)])
    given, keys, one = conditioning(), [(0, 4), (0, 5), (1, 6)], perception(student, perceptual_text_weight=2.0)
    whole = one.of_batch(given, Draws(rollout=state, state=state, position=position), keys, nullcontext)
    found = whole(landed, target, t, t_end)
    alone = ConditioningBatch.stack([make_record(2).conditioning]).to("cpu", torch.float32)
    rows = slice(4, 6)  # of the last image
    draws = Draws(rollout=state[rows], state=state[rows], position=position[rows])
    last = one.of_batch(alone, draws, keys[2:], nullcontext)(landed[rows], target[rows], t[rows], t_end[rows])
    torch.testing.assert_close(found[rows], last, rtol=1e-4, atol=1e-6)
    assert len(set(found.tolist())) == 6


def test_a_state_is_noised_as_the_schedule_has_it(student: Student) -> None:
    """From x0 at once, or over a state on the way: the same signal, and noise of the same variance."""
    noised, (x0, noise) = perception(student)._noised, (latents(), latents(1))
    now, later = torch.tensor([249] * 3), torch.tensor([700] * 3)
    a_now, a_later = alphas_at(ALPHAS, now), alphas_at(ALPHAS, later)
    clean = torch.full_like(now, CLEAN)
    torch.testing.assert_close(noised(x0, noise, clean, later), a_later.sqrt() * x0 + (1 - a_later).sqrt() * noise)
    over = noised(a_now.sqrt() * x0, noise, now, later)  # what is left of x0, and the noise that is added
    torch.testing.assert_close(over, a_later.sqrt() * x0 + (1 - a_later / a_now).sqrt() * noise)
    variance = (1 - a_now) * a_later / a_now + (1 - a_later / a_now)
    torch.testing.assert_close(variance, 1 - a_later)


def test_the_loss_grows_by_what_is_seen_of_the_landing() -> None:
    rollouts, draws = solves_for(), draws_at([0, 2, 4])
    seen = []

    def perceive(landed: Tensor, target: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
        seen.append((landed, target, t, t_end))
        return torch.tensor([1.0, 2.0, 3.0])

    def predict(z: Tensor, t: Tensor) -> Tensor:
        return 0.3 * z

    plain = settings_for(4)
    perceptual = settings_for(4)
    object.__setattr__(perceptual, "perceive", perceive)
    losses = [per_sample(phased_loss(rollouts, draws, predict, predict, one)) for one in (perceptual, plain)]
    torch.testing.assert_close(losses[0] - losses[1], torch.tensor([1.0, 2.0, 3.0]))
    ((landed, target, t, t_end),) = seen
    assert t.tolist() == [999, 749, 499] and t_end.tolist() == [749, 499, 249]
    z = torch.stack([rollouts.states[0, 0], rollouts.states[1, 2], rollouts.states[2, 4]])
    torch.testing.assert_close(landed, ddim_step(z, 0.3 * z, alphas_at(ALPHAS, t), alphas_at(ALPHAS, t_end)))
    assert torch.equal(target[1], rollouts.states[1, 4])


def test_a_resumed_run_is_the_same_bit_for_bit(configure: Configure, shards: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"perceptual_weight": 0.5, "checkpoint_every": 2}
    whole = train(configure(**settings, max_steps=4), shards=shards, run=tmp_path / "whole")
    train(configure(**settings, max_steps=2), shards=shards, run=tmp_path / "run")
    resumed = train(configure(**settings, max_steps=4), shards=shards, run=tmp_path / "run", resume="auto")
    assert resumed.resumed_from == 2 and same(weights(resumed), weights(whole))
    plain = train(configure(max_steps=4), shards=shards, run=tmp_path / "plain")
    assert not same(weights(plain), weights(whole))


@pytest.mark.parametrize("key", ["perceptual_weight", "critic_weight"])
@pytest.mark.parametrize(
    "settings", [{"objective": "pcm"}, {"objective": "x0"}, {"states": "interpolated"}], ids=str
)
def test_objectives_that_land_nowhere_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: received 0.5, expected 0 unless"):
        TrainConfig(**{key: 0.5}, **settings)
