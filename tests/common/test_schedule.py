from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from common import grids, schedule
from common.errors import UsageError
from common.schedule import (
    alphas_at,
    ddim_step,
    diffuse,
    guided,
    make_alphas_cumprod,
    phase_target_eps,
    phase_target_x0,
    predict_x0,
)

ALPHAS = make_alphas_cumprod()


def ddim_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=grids.BETA_START,
        beta_end=grids.BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 20, 40, 50])
def test_the_trailing_grid_and_its_steps_are_those_of_diffusers(num_steps: int) -> None:
    reference = ddim_scheduler()
    reference.set_timesteps(num_steps)
    timesteps = schedule.trailing_timesteps(num_steps)
    assert timesteps.tolist() == reference.timesteps.tolist()

    alphas_cumprod = schedule.make_alphas_cumprod()
    assert torch.allclose(alphas_cumprod, reference.alphas_cumprod, rtol=1e-6)
    latents, eps = torch.randn(2, 4, 8, 8).unbind(0)
    for index, t in enumerate(timesteps):
        end = alphas_cumprod[timesteps[index + 1]] if index + 1 < num_steps else torch.tensor(1.0)
        ours = ddim_step(latents, eps, alphas_cumprod[t], end)
        theirs = reference.step(eps, t, latents, return_dict=False)[0]
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_recorded_states_contain_every_phase_boundary() -> None:
    recorded = schedule.trailing_timesteps(40)[::5].tolist()
    for num_phases in (1, 2, 4, 8):
        assert set(schedule.trailing_timesteps(num_phases).tolist()) <= set(recorded)


def test_the_upstream_grid_of_20_steps_runs_from_951_to_1() -> None:
    assert schedule.upstream_timesteps(20).tolist() == list(range(951, 0, -50))


def test_eps_and_x0_are_two_views_of_one_state() -> None:
    alphas_cumprod = schedule.make_alphas_cumprod()[torch.tensor([19, 999])].view(2, 1, 1, 1)
    noisy_latents, x0 = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64).unbind(0)
    eps = schedule.predict_eps(noisy_latents, x0, alphas_cumprod.double())
    assert torch.allclose(predict_x0(noisy_latents, eps, alphas_cumprod.double()), x0)


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_an_impossible_number_of_steps_is_refused(num_steps: int) -> None:
    with pytest.raises(UsageError, match="expected 1 to 1000"):
        schedule.trailing_timesteps(num_steps)


def random_pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 5, 4, 6, 6, generator=generator, dtype=torch.float64)
    return first, second


@pytest.mark.parametrize(("t", "t_end"), [(999, 749), (999, -1), (499, 249), (249, -1), (124, -1)])
def test_one_ddim_step_with_the_target_eps_lands_on_the_stored_state(t: int, t_end: int) -> None:
    z, z_end = random_pair()
    a, a_end = (alphas_at(ALPHAS.double(), torch.full((5,), when)) for when in (t, t_end))
    eps = phase_target_eps(z, z_end, a, a_end)
    torch.testing.assert_close(ddim_step(z, eps, a, a_end), z_end, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(predict_x0(z, eps, a), phase_target_x0(z, z_end, a, a_end), rtol=1e-9, atol=1e-9)


def test_the_target_x0_of_a_crossing_to_the_end_is_the_solved_x0() -> None:
    z, z_end = random_pair()
    a = alphas_at(ALPHAS.double(), torch.full((5,), 124))
    torch.testing.assert_close(phase_target_x0(z, z_end, a, torch.ones_like(a)), z_end)


def test_a_step_of_the_true_path_has_its_constant_eps_as_target() -> None:
    """With x0 and eps constant along a path, crossing any part of it is answered by that eps."""
    x0, eps = random_pair()
    a, a_end = (alphas_at(ALPHAS.double(), torch.full((5,), when)) for when in (624, 249))
    z, z_end = diffuse(x0, eps, a), diffuse(x0, eps, a_end)
    torch.testing.assert_close(phase_target_eps(z, z_end, a, a_end), eps, rtol=1e-9, atol=1e-9)


def test_guidance_of_one_is_the_conditional_prediction() -> None:
    cond, uncond = random_pair()
    torch.testing.assert_close(guided(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guided(cond, uncond, 7.5), uncond + 7.5 * (cond - uncond))
