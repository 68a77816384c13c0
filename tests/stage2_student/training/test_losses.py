from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from common.config import TrainConfig
from common.ddim import consistency_value
from common.errors import UsageError
from common.schedule import (
    alphas_at,
    ddim_step,
    diffuse,
    make_alphas_cumprod,
    phase_target_eps,
    phase_target_x0,
    predict_x0,
    trailing_timesteps,
)
from stage2_student.training.losses import (
    crossing_loss,
    elementwise_loss,
    guided_solver_step,
    landing_factor,
    per_sample,
    pseudo_huber,
    region_weights,
)
from stage2_student.training.objectives import (
    LossSettings,
    Rollouts,
    interpolated_loss,
    lcm_loss,
    loss_of,
    pcm_loss,
    phased_loss,
    select_rollout,
    x0_loss,
)
from stage2_student.training.phases import Draws, draw, even_phases, require_distance, upstream_phases

ALPHAS = make_alphas_cumprod()
STATES = 8


def random_pair(batch: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, 6, 6, generator=generator).double(), torch.randn(
        batch, 4, 6, 6, generator=generator
    ).double()


def solves_for(batch: int = 3, *, predictions: bool = False) -> Rollouts:
    generator = torch.Generator().manual_seed(2)
    shape = (batch, STATES, 4, 6, 6)
    return Rollouts(
        states=torch.randn(batch, STATES + 1, 4, 6, 6, generator=generator),
        timesteps=trailing_timesteps(STATES).expand(batch, -1),
        x0_cond=torch.randn(shape, generator=generator) if predictions else None,
        x0_uncond=torch.randn(shape, generator=generator) if predictions else None,
    )


def settings_for(num_phases: int = 4, **train: object) -> LossSettings:
    return LossSettings(
        train=TrainConfig(num_phases=num_phases, **train),  # type: ignore[arg-type]
        phases=even_phases(STATES, num_phases),
        alphas_cumprod=ALPHAS,
    )


def draws_at(states: list[int], position: float = 0.5) -> Draws:
    return Draws(
        rollout=torch.zeros(len(states), dtype=torch.long),
        state=torch.tensor(states),
        position=torch.full((len(states),), position),
    )


@pytest.mark.parametrize(("t", "t_end"), [(999, 749), (249, -1)])
def test_the_landing_loss_is_the_squared_error_of_the_landing_point(t: int, t_end: int) -> None:
    z, z_end = (value.float() for value in random_pair())
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    a, a_end = (alphas_at(ALPHAS, torch.full((5,), when)) for when in (t, t_end))
    loss = crossing_loss(eps, phase_target_eps(z, z_end, a, a_end), a, a_end, kind="landing", huber_c=1.0)
    expected = (ddim_step(z, eps, a, a_end) - z_end) ** 2
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


def test_the_landing_factor_is_the_derivative_of_the_ddim_step() -> None:
    z, eps = random_pair()
    a, a_end = (alphas_at(ALPHAS.double(), torch.full((5,), when)) for when in (749, 499))
    moved = ddim_step(z, eps + 1.0, a, a_end) - ddim_step(z, eps, a, a_end)
    torch.testing.assert_close(moved, landing_factor(a, a_end).expand_as(moved), rtol=1e-9, atol=1e-9)
    assert (landing_factor(a, a_end) < 0).all()


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away() -> None:
    c = 1e-3
    small, large = torch.tensor([1e-6, -1e-6]), torch.tensor([3.0, -3.0])
    torch.testing.assert_close(pseudo_huber(small, c), small**2 / (2 * c), rtol=1e-4, atol=0)
    torch.testing.assert_close(pseudo_huber(large, c), large.abs() - c, rtol=1e-5, atol=0)
    error = torch.linspace(-2, 2, 41, dtype=torch.float64)
    torch.testing.assert_close(pseudo_huber(error, 0.3), (error**2 + 0.09).sqrt() - 0.3)


def test_losses_are_computed_in_float32_whatever_the_network_returns() -> None:
    a = alphas_at(ALPHAS, torch.tensor([999]))
    eps, target = torch.full((1, 4, 2, 2), 0.5, dtype=torch.bfloat16), torch.full((1, 4, 2, 2), 0.501)
    loss = crossing_loss(eps, target, a, torch.ones_like(a), kind="l2", huber_c=1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full_like(loss, 1e-6), rtol=1e-3, atol=0)


def test_region_weights_cover_every_latent_cell_that_a_text_pixel_falls_into() -> None:
    positions = torch.zeros(2, 1, 48, 48)
    positions[0, 0, 9, 17] = 2.0  # one pixel, two lines over each other
    weights = region_weights(positions, (6, 6), 4.0)
    expected = torch.ones(2, 1, 6, 6)
    expected[0, 0, 1, 2] = 4.0
    torch.testing.assert_close(weights, expected)


def test_region_weights_move_attention_and_keep_the_scale_of_the_loss() -> None:
    loss = torch.ones(1, 4, 6, 6)
    weights = torch.ones(1, 1, 6, 6)
    weights[..., 0] = 10.0
    torch.testing.assert_close(per_sample(loss, weights), per_sample(loss))
    loss[..., 0] = 2.0
    torch.testing.assert_close(per_sample(loss, weights), torch.tensor([(6 * 10 * 2.0 + 30) / (60 + 30)]))
    torch.testing.assert_close(per_sample(loss), torch.tensor([(6 * 2.0 + 30) / 36]))


def test_phases_start_and_end_at_stored_states() -> None:
    phases = even_phases(8, 4)
    assert phases.starts == (0, 2, 4, 6)
    assert phases.end(torch.arange(8)).tolist() == [2, 2, 4, 4, 6, 6, 8, 8]
    assert (phases.num_states, phases.num_phases, phases.shortest) == (8, 4, 2)


def test_draws_are_those_that_runs_begun_before_have_had() -> None:
    ten = [(2, index) for index in range(10)]
    even = draw(ten, seed=3, num_rollouts=2, phases=even_phases(8, 4), starts_only=True).state
    assert even.tolist() == [0, 6, 2, 2, 0, 0, 0, 4, 0, 4]


@pytest.mark.parametrize("num_phases", [0, 3, 5, 16])
def test_a_number_of_phases_that_does_not_divide_the_states_is_refused(num_phases: int) -> None:
    with pytest.raises(UsageError, match=r"train\.num_phases.*expected 1, 2, 4, 8"):
        even_phases(8, num_phases)


@pytest.mark.parametrize(
    ("num_phases", "boundaries", "labels"),
    [
        (2, (0, 8), (501, 1)),
        (4, (0, 4, 6, 8), (751, 501, 251, 1)),
        (8, (0, 2, 3, 4, 5, 6, 7, 8), (876, 751, 626, 501, 376, 251, 126, 1)),
    ],
)
def test_phases_of_upstreams_grid_start_at_noise_and_end_at_x0_with_its_labels(
    num_phases: int, boundaries: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    phases = upstream_phases(num_phases, trailing_timesteps(8).tolist())
    assert (phases.boundaries, phases.labels) == (boundaries, labels)
    assert phases.num_phases == num_phases - 1
    assert phases.end(torch.tensor(boundaries[:-1])).tolist() == list(boundaries[1:])


@pytest.mark.parametrize(("num_phases", "num_states"), [(8, 4), (4, 2), (2, 5)])
def test_upstreams_grid_needs_stored_states_near_its_labels(num_phases: int, num_states: int) -> None:
    recorded = trailing_timesteps(num_states).tolist()
    if num_phases == 2:  # noise and x0 are all that it needs
        assert upstream_phases(2, recorded).boundaries == (0, num_states)
        return
    with pytest.raises(UsageError, match=r'grid "upstream" .* within 5 of t = .*the shards hold t = 999'):
        upstream_phases(num_phases, recorded)


@pytest.mark.parametrize("states", ["starts", "interpolated"])
def test_a_student_of_upstreams_grid_crosses_to_the_stored_states_from_its_own_labels(states: str) -> None:
    """Its last crossing lands on x0 with one more call to come, at t = 1."""
    rollouts, settings = solves_for(), settings_for(states=states, grid="upstream")
    settings = replace(settings, phases=upstream_phases(4, trailing_timesteps(STATES).tolist()))
    starts, ends, t_end = [0, 4, 6], torch.tensor([4, 6, 8]), torch.tensor([501, 251, 1])
    draws = draws_at(starts, position=0.0)
    a_end = alphas_at(ALPHAS, t_end)

    def perfect(z: Tensor, t: Tensor) -> Tensor:
        assert t.tolist() == [751, 501, 251]
        torch.testing.assert_close(z, rollouts.at(draws.state), rtol=1e-4, atol=1e-4)
        eps = phase_target_eps(z, rollouts.at(ends), alphas_at(ALPHAS, t), a_end)
        landed = ddim_step(z, eps, alphas_at(ALPHAS, t), a_end)
        torch.testing.assert_close(landed, rollouts.at(ends), rtol=1e-3, atol=1e-3)
        return eps

    loss = loss_of(settings.train)
    assert loss(rollouts, draws, perfect, perfect, settings).abs().max() < 1e-4
    off = loss(rollouts, draws, lambda z, t: perfect(z, t) + 1, perfect, settings)
    torch.testing.assert_close(off, torch.full_like(off, (1 + 1e-6) ** 0.5 - 1e-3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_phases": 1}, r"num_phases: received 1, expected 2, 4 or 8 .* calls t = 1 on pure noise"),
        ({"num_phases": 3}, r"num_phases: received 3, expected 2, 4 or 8 .* of 3 is out of range"),
        ({"objective": "pcm"}, r"objective: received 'pcm, states = starts', expected phased at"),
        ({"states": "all"}, r"objective: received 'phased, states = all', expected phased at"),
    ],
)
def test_what_upstreams_grid_cannot_do_is_refused_with_the_reason(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(grid="upstream", **settings)  # type: ignore[arg-type]


def test_targets_between_adjacent_solver_steps_are_refused() -> None:
    require_distance(2)
    with pytest.raises(UsageError, match=r"precompute\.record_every of 2 or more"):
        require_distance(1)


def test_draws_depend_on_seed_epoch_and_sample_and_on_nothing_else() -> None:
    def drawn(indices: list[int], *, seed: int = 0, epoch: int = 0, starts_only: bool = True) -> Draws:
        phases = even_phases(8, 4)
        samples = [(epoch, index) for index in indices]
        return draw(samples, seed=seed, num_rollouts=3, phases=phases, starts_only=starts_only)

    def rows(draws: Draws) -> list[tuple[float, ...]]:
        columns = (draws.rollout.tolist(), draws.state.tolist(), draws.position.tolist())
        return list(zip(*columns, strict=True))

    whole = rows(drawn(list(range(200))))
    assert rows(drawn([7, 3])) == [whole[7], whole[3]]
    assert rows(drawn(list(range(200)), epoch=1)) != whole
    assert rows(drawn(list(range(200)), seed=1)) != whole
    assert {row[0] for row in whole} == {0, 1, 2}
    assert {row[1] for row in whole} == {0, 2, 4, 6}
    assert {row[1] for row in rows(drawn(list(range(200)), starts_only=False))} == set(range(8))


@pytest.mark.parametrize(("starts_only", "choices"), [(True, {0, 2, 4, 6}), (False, set(range(8)))])
def test_more_draws_of_a_sample_follow_its_first_at_other_states_until_all_were_met(
    starts_only: bool, choices: set[int]
) -> None:
    def drawn(per_sample: int) -> dict[str, Tensor]:
        samples = [(3, index) for index in range(40)]
        draws = draw(
            samples,
            seed=1,
            num_rollouts=3,
            phases=even_phases(8, 4),
            starts_only=starts_only,
            per_sample=per_sample,
        )
        values = {"rollout": draws.rollout, "state": draws.state, "position": draws.position}
        return {name: value.view(40, per_sample) for name, value in values.items()}

    one, few, many = drawn(1), drawn(3), drawn(len(choices) + 1)
    for name in one:
        assert torch.equal(few[name][:, :1], one[name]) and torch.equal(many[name][:, :3], few[name])
    assert all(set(row[:-1]) == choices for row in many["state"].tolist())
    assert {int(row[-1]) for row in many["state"]} == choices  # drawn among all of them again
    assert len(many["position"].unique()) == many["position"].numel()


def test_several_draws_take_rollouts_of_their_own_sample() -> None:
    states = torch.arange(2 * 3 * 9).view(2, 3, 9, 1, 1, 1).half()
    rollouts = select_rollout(states, torch.arange(16).view(2, 8), None, None, torch.tensor([2, 0, 1, 1]))
    assert rollouts.states[:, 0].flatten().tolist() == [18, 0, 36, 36]
    assert rollouts.timesteps[:, 0].tolist() == [0, 0, 8, 8]


def test_each_sample_takes_its_own_drawn_rollout() -> None:
    states = torch.arange(2 * 3 * 9).view(2, 3, 9, 1, 1, 1).half()
    timesteps = torch.arange(2 * 3 * 8).view(2, 3, 8)
    rollouts = select_rollout(states, timesteps, None, None, torch.tensor([2, 0]))
    assert rollouts.at(torch.tensor([0, 0])).dtype == torch.float32
    assert rollouts.states[:, 0].flatten().tolist() == [18, 27]
    assert rollouts.timesteps[:, 0].tolist() == [16, 24]
    assert rollouts.timestep(torch.tensor([8, 0])).tolist() == [-1, 24]


def test_the_phased_loss_vanishes_for_a_student_that_lands_on_the_stored_states() -> None:
    rollouts, settings = solves_for(), settings_for()
    draws = draws_at([0, 2, 6])

    def perfect(z: Tensor, t: Tensor) -> Tensor:
        assert t.tolist() == [999, 749, 249]
        torch.testing.assert_close(z, rollouts.at(draws.state))
        ends = rollouts.at(torch.tensor([2, 4, 8]))
        t_end = torch.tensor([749, 499, -1])
        return phase_target_eps(z, ends, alphas_at(ALPHAS, t), alphas_at(ALPHAS, t_end))

    assert phased_loss(rollouts, draws, perfect, perfect, settings).abs().max() < 1e-6
    off = phased_loss(rollouts, draws, lambda z, t: perfect(z, t) + 1, perfect, settings)
    torch.testing.assert_close(off, torch.full_like(off, (1 + 1e-6) ** 0.5 - 1e-3))


def test_pcm_takes_the_stored_state_at_a_phase_end_and_the_students_value_inside() -> None:
    rollouts, settings = solves_for(2), settings_for(objective="pcm", loss="landing")
    draws = draws_at([0, 7])
    calls: list[list[int]] = []

    def zero(z: Tensor, t: Tensor) -> Tensor:
        calls.append(t.tolist())
        return torch.zeros_like(z)

    loss = pcm_loss(rollouts, draws, zero, zero, settings)
    assert calls == [[874, 0], [999, 124]]  # target first, at the next stored state
    a = {t: alphas_at(ALPHAS, torch.tensor([t])) for t in (999, 874, 749, 124)}
    inside = ddim_step(rollouts.states[:1, 1], torch.zeros(1, 4, 6, 6), a[874], a[749])
    mine = ddim_step(rollouts.states[:1, 0], torch.zeros(1, 4, 6, 6), a[999], a[749])
    torch.testing.assert_close(loss[:1], (mine - inside) ** 2, rtol=1e-3, atol=1e-4)
    at_end = predict_x0(rollouts.states[1:, 7], torch.zeros(1, 4, 6, 6), a[124]) - rollouts.states[1:, 8]
    torch.testing.assert_close(loss[1:], at_end**2, rtol=1e-3, atol=1e-4)


def test_no_gradient_flows_through_the_targets_of_pcm_and_lcm() -> None:
    rollouts = solves_for(3, predictions=True)
    for objective_loss, objective in ((pcm_loss, "pcm"), (lcm_loss, "lcm")):
        scale, target_scale = torch.ones((), requires_grad=True), torch.ones((), requires_grad=True)
        objective_loss(
            rollouts,
            draws_at([0, 3, 7]),
            lambda z, t, s=scale: s * z,
            lambda z, t, s=target_scale: s * z,
            settings_for(objective=objective),
        ).mean().backward()
        assert scale.grad is not None and scale.grad != 0
        assert target_scale.grad is None


@pytest.mark.parametrize("position", [0.0, 0.5, 0.999])
def test_the_interpolated_loss_vanishes_for_the_straight_path_and_stays_inside_its_phase(
    position: float,
) -> None:
    rollouts, settings = solves_for(2), settings_for(states="interpolated", loss="l2")
    draws = draws_at([2, 6], position)
    ends = rollouts.at(torch.tensor([4, 8]))
    a, a_end = (alphas_at(ALPHAS, torch.tensor(t)) for t in ([749, 249], [499, -1]))
    eps = phase_target_eps(rollouts.at(draws.state), ends, a, a_end)
    x0 = phase_target_x0(rollouts.at(draws.state), ends, a, a_end)

    def perfect(z: Tensor, t: Tensor) -> Tensor:
        assert 499 < t[0] <= 749 and -1 < t[1] <= 249
        torch.testing.assert_close(z, diffuse(x0, eps, alphas_at(ALPHAS, t)))
        return eps

    assert interpolated_loss(rollouts, draws, perfect, perfect, settings).abs().max() < 1e-6


def test_lcm_compares_the_student_with_its_own_value_one_guided_step_on() -> None:
    rollouts = solves_for(2, predictions=True)
    assert rollouts.x0_cond is not None and rollouts.x0_uncond is not None
    settings = settings_for(objective="lcm", loss="l2", guidance_scale=3.0, lcm_solver_steps=40)
    seen: list[tuple[Tensor, list[int]]] = []

    def zero(z: Tensor, t: Tensor) -> Tensor:
        seen.append((z, t.tolist()))
        return torch.zeros_like(z)

    loss = lcm_loss(rollouts, draws_at([4, 5]), zero, zero, settings)
    assert seen[0][1] == [474, 349]
    assert seen[1][1] == [499, 374]
    a, a_next = alphas_at(ALPHAS, torch.tensor([499])), alphas_at(ALPHAS, torch.tensor([474]))
    x0 = rollouts.x0_uncond[:1, 4] + 3 * (rollouts.x0_cond[:1, 4] - rollouts.x0_uncond[:1, 4])
    z_next = guided_solver_step(rollouts.states[:1, 4], x0, a, a_next)
    torch.testing.assert_close(seen[0][0][:1], z_next)
    nothing = torch.zeros_like(z_next)
    expected = consistency_value(rollouts.states[:1, 4], nothing, torch.tensor([499]), a) - consistency_value(
        z_next, nothing, torch.tensor([474]), a_next
    )
    torch.testing.assert_close(loss[:1], expected**2)


def test_lcm_lands_on_the_guided_x0_where_the_solver_step_reaches_the_end() -> None:
    base = solves_for(1, predictions=True)
    assert base.x0_cond is not None
    rollouts = Rollouts(
        states=base.states,
        timesteps=torch.full((1, STATES), 10),
        x0_cond=base.x0_cond,
        x0_uncond=base.x0_uncond,
    )
    settings = settings_for(objective="lcm", loss="l2", guidance_scale=1.0)
    loss = lcm_loss(
        rollouts, draws_at([0]), lambda z, t: torch.zeros_like(z), lambda z, t: torch.full_like(z, 9.0), settings
    )
    a = alphas_at(ALPHAS, torch.tensor([10]))
    value = consistency_value(rollouts.states[:, 0], torch.zeros(1, 4, 6, 6), torch.tensor([10]), a)
    torch.testing.assert_close(loss, (value - base.x0_cond[:, 0]) ** 2, rtol=1e-4, atol=1e-5)


def test_the_x0_loss_compares_with_the_guided_prediction_and_needs_it_recorded() -> None:
    rollouts, settings = solves_for(2, predictions=True), settings_for(objective="x0", loss="l2")
    draws = draws_at([1, 6])
    loss = x0_loss(rollouts, draws, lambda z, t: torch.zeros_like(z), lambda z, t: z, settings)
    x0 = rollouts.at(draws.state) / alphas_at(ALPHAS, rollouts.timestep(draws.state)).sqrt()
    torch.testing.assert_close(loss, (x0 - rollouts.guided_x0(draws.state, 7.5)) ** 2)
    with pytest.raises(UsageError, match=r"precompute\.store_predictions = true"):
        x0_loss(solves_for(2), draws, lambda z, t: z, lambda z, t: z, settings)


def test_elementwise_losses_differ_as_named() -> None:
    error = torch.tensor([0.5])
    assert elementwise_loss(error, "l2", 1.0).item() == 0.25
    assert elementwise_loss(error, "landing", 1.0).item() == 0.25
    torch.testing.assert_close(elementwise_loss(error, "huber", 1.0), torch.tensor([1.25**0.5 - 1]))
