from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from common import schedule
from common.errors import UsageError


def ddim_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=schedule.BETA_START,
        beta_end=schedule.BETA_END,
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
        ours = schedule.ddim_step(latents, eps, alphas_cumprod[t], end)
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
    assert torch.allclose(schedule.predict_x0(noisy_latents, eps, alphas_cumprod.double()), x0)


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_an_impossible_number_of_steps_is_refused(num_steps: int) -> None:
    with pytest.raises(UsageError, match="expected 1 to 1000"):
        schedule.trailing_timesteps(num_steps)
