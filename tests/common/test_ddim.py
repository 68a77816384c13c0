from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from common.ddim import CLEAN, Grid, boundary_scalings, integrate, parse_grid, trailing_grid, upstream_grid
from common.errors import UsageError
from common.schedule import alphas_at, ddim_step, make_alphas_cumprod, predict_eps

ALPHAS = make_alphas_cumprod()
MEAN, SPREAD = 0.7, 0.5


def linear_eps(z: Tensor, t: Tensor) -> Tensor:
    """Exact eps where x0 is normal with MEAN and SPREAD: linear in z, and so is the ODE."""
    a = alphas_at(ALPHAS, t).double()
    return (1 - a).sqrt() * (z - a.sqrt() * MEAN) / (a * SPREAD**2 + 1 - a)


def solution(z: Tensor, start: int, end: int) -> Tensor:
    """Where the linear ODE leads from z at `start`: it keeps the distance from the mean in standard deviations."""
    a, a_end = (alphas_at(ALPHAS, torch.tensor([t])).double() for t in (start, end))
    scale = ((a_end * SPREAD**2 + 1 - a_end) / (a * SPREAD**2 + 1 - a)).sqrt()
    return a_end.sqrt() * MEAN + scale * (z - a.sqrt() * MEAN)


def noise() -> Tensor:
    return torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_error_of_a_solve_halves_with_the_step_as_that_of_a_first_order_method_must() -> None:
    errors = []
    for num_steps in (25, 50, 100, 200, 400):
        timesteps = torch.linspace(999, 199, num_steps + 1).round().long()
        found = integrate(linear_eps, noise(), Grid(timesteps=timesteps[:-1], end=timesteps[-1]))
        errors.append(float((found - solution(noise(), 999, 199)).norm()))
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(0.9 < order < 1.1 for order in orders), orders


def test_a_fine_solve_to_the_clean_end_is_the_odes_solution() -> None:
    found = integrate(linear_eps, noise(), trailing_grid(1000))
    torch.testing.assert_close(found, solution(noise(), 999, CLEAN), rtol=0, atol=0.01)


def test_a_step_is_ddims_and_calls_the_network_at_the_grids_timesteps() -> None:
    called: list[list[int]] = []

    def predict(z: Tensor, t: Tensor) -> Tensor:
        called.append(t.tolist())
        return linear_eps(z, t)

    found = integrate(predict, noise(), trailing_grid(2))
    assert called == [[999] * 3, [499] * 3]
    z = noise()
    for t, end in ((999, 499), (499, CLEAN)):
        now, later = torch.full((3,), t), torch.full((3,), end)
        z = ddim_step(z, linear_eps(z, now), alphas_at(ALPHAS, now), alphas_at(ALPHAS, later))
    assert torch.equal(found, z)


def test_the_solve_goes_on_from_what_the_callback_returns_and_shows_it_the_end() -> None:
    seen: dict[int, Tensor] = {}

    def round_and_keep(index: int, z: Tensor) -> Tensor:
        seen[index] = z.half().double()
        return seen[index]

    found = integrate(linear_eps, noise(), trailing_grid(4), round_and_keep)
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert found is seen[4]
    last = integrate(linear_eps, seen[3], Grid(timesteps=torch.tensor([249]), end=torch.tensor(CLEAN)))
    assert torch.equal(last.half(), seen[4].half())


def test_samples_may_each_have_a_grid_of_their_own() -> None:
    timesteps, end = torch.tensor([[999, 700, 400], [800, 500, 300]]), torch.tensor([600, 300, CLEAN])
    together = integrate(linear_eps, noise(), Grid(timesteps=timesteps, end=end))
    for row in range(3):
        grid = Grid(timesteps=timesteps[:, row], end=end[row])
        assert torch.equal(integrate(linear_eps, noise()[row : row + 1], grid)[0], together[row])


def test_grids_end_where_their_owners_end() -> None:
    assert (
        parse_grid("trailing:4").timesteps.tolist() == trailing_grid(4).timesteps.tolist() == [999, 749, 499, 249]
    )
    assert parse_grid("upstream:4").timesteps.tolist() == upstream_grid(4).timesteps.tolist() == [751, 501, 251, 1]
    assert [int(grid.end) for grid in (trailing_grid(4), upstream_grid(4))] == [CLEAN, 0]
    (crossing,) = upstream_grid(1).crossings(2, torch.device("cpu"))
    assert torch.equal(crossing.alphas_cumprod_end, ALPHAS[0].expand(2, 1, 1, 1))


@pytest.mark.parametrize(
    "text", ["", "trailing", "trailing:", "trailing:x", "leading:4", "trailing:0", "upstream:-3"]
)
def test_a_grid_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        parse_grid(text)


def test_the_noise_that_leads_to_an_image_is_solved_exactly_in_any_number_of_steps() -> None:
    x0 = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(1, 6, 2, 2)
    for num_steps in (1, 3, 8):
        found = integrate(
            lambda z, t: predict_eps(z, x0, alphas_at(ALPHAS, t).double()),
            torch.randn(1, 6, 2, 2, dtype=torch.float64),
            trailing_grid(num_steps),
        )
        torch.testing.assert_close(found, x0, rtol=1e-5, atol=1e-5)


def test_lcm_boundary_condition_is_the_identity_at_zero_and_x0_far_from_it() -> None:
    c_skip, c_out = boundary_scalings(torch.tensor([0, 1, 999]))
    torch.testing.assert_close(c_skip.flatten(), torch.tensor([1.0, 0.25 / 100.25, 0.25 / (9990.0**2 + 0.25)]))
    torch.testing.assert_close(c_out.flatten()[0], torch.tensor(0.0))
    torch.testing.assert_close(c_out.flatten()[2], torch.tensor(1.0))
