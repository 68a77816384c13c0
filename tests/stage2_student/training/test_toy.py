"""The objectives on a two-dimensional problem whose teacher is exact, trained for seconds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from common.config import TrainConfig
from common.ddim import Grid, Predict, integrate, trailing_grid
from common.schedule import alphas_at, make_alphas_cumprod, predict_eps, predict_x0, trailing_timesteps
from stage2_student.training.objectives import (
    LossSettings,
    Rollouts,
    interpolated_loss,
    pcm_loss,
    phased_loss,
    unrolled_loss,
    x0_loss,
)
from stage2_student.training.phases import Draws, even_phases

ALPHAS = make_alphas_cumprod()
NUM_PHASES, STEPS, KEEP = 4, 40, 5
CENTRES = torch.stack([torch.tensor([math.cos(a), math.sin(a)]) for a in torch.arange(6) * math.pi / 3])
SPREAD = 0.3


def teacher_eps(z: Tensor, t: Tensor) -> Tensor:
    """Exact eps of a ring of six Gaussians, through the posterior mean of x0; z (B, 2, 1, 1)."""
    a = alphas_at(ALPHAS, t)[..., 0, 0]  # (B, 1)
    variance = a * SPREAD**2 + 1 - a
    offset = z[..., 0, 0][:, None] - a.sqrt()[:, None] * CENTRES  # (B, 6, 2)
    responsibility = (-(offset**2).sum(-1) / (2 * variance)).softmax(-1)[..., None]  # (B, 6, 1)
    mean = CENTRES + (a.sqrt() * SPREAD**2 / variance)[:, None] * offset
    x0 = (responsibility * mean).sum(1)[..., None, None]
    return predict_eps(z, x0, alphas_at(ALPHAS, t))


def solve(predict: Predict, noise: Tensor, grid: Grid) -> Tensor:
    """All states of a solve, (B, N + 1, 2, 1, 1)."""
    states: list[Tensor] = []

    def keep(_index: int, z: Tensor) -> Tensor:
        states.append(z)
        return z

    integrate(predict, noise, grid, keep)
    return torch.stack(states, dim=1)


class ToyStudent(nn.Module):
    """A small network over (z, t)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2)
        )

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        phase = nn.functional.one_hot((t * 8 // 1000).clamp(max=7), 8).float()
        return self.layers(torch.cat([z[..., 0, 0], phase], dim=1))[..., None, None]


def endpoint_error(loss_of, batch: int = 256, **train: object) -> float:  # type: ignore[no-untyped-def]
    """Train on recorded rollouts for seconds; mean distance of the 4-step endpoints from the teacher's."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6000, 2, 1, 1, generator=generator)
    with torch.no_grad():
        states = solve(teacher_eps, noise, trailing_grid(STEPS))[:, ::KEEP]
    grid = trailing_timesteps(STEPS)[::KEEP]
    predictions = torch.stack(
        [
            predict_x0(z, teacher_eps(z, torch.full((len(z),), t)), ALPHAS[t])
            for z, t in zip(states[:, :-1].unbind(1), grid.tolist(), strict=True)
        ],
        dim=1,
    )
    phases = even_phases(STEPS // KEEP, NUM_PHASES)
    settings = LossSettings(train=TrainConfig(**train), phases=phases, alphas_cumprod=ALPHAS)  # type: ignore[arg-type]
    torch.manual_seed(0)
    student = ToyStudent()
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        rows = torch.randint(0, 5000, (batch,), generator=generator)
        starts = torch.randint(0, NUM_PHASES, (batch,), generator=generator) * phases.shortest
        anywhere = torch.randint(0, phases.num_states, (batch,), generator=generator)
        draws = Draws(
            rollout=torch.zeros(batch, dtype=torch.long),
            state=anywhere if settings.train.states == "all" else starts,
            position=torch.rand(batch, generator=generator),
        )
        rollouts = Rollouts(
            states=states[rows],
            timesteps=grid.expand(batch, -1),
            x0_cond=predictions[rows],
            x0_uncond=predictions[rows],
        )
        loss = loss_of(rollouts, draws, student, student, settings).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        ends = solve(student, noise[5000:], trailing_grid(NUM_PHASES))[:, -1]
    return float((ends - states[5000:, -1]).flatten(1).norm(dim=1).mean())


@pytest.fixture(scope="module")
def baseline() -> float:
    """The x0 recipe: at best as good as the teacher at four steps."""
    return endpoint_error(x0_loss, objective="x0", loss="l2", states="all")


@pytest.mark.parametrize(
    ("loss_of", "train"),
    [
        (phased_loss, {}),
        (phased_loss, {"loss": "landing"}),
        (phased_loss, {"loss": "l2", "states": "all"}),
        (pcm_loss, {"objective": "pcm", "loss": "landing", "states": "all"}),
        (interpolated_loss, {"loss": "landing", "states": "interpolated"}),
    ],
    ids=["phased-huber", "phased-landing", "phased-all-states", "pcm", "rectified"],
)
def test_objectives_that_cross_phases_end_nearer_the_teacher_than_x0_regression(loss_of, train, baseline) -> None:  # type: ignore[no-untyped-def]
    error = endpoint_error(loss_of, **train)
    assert error < 0.65 * baseline


def test_a_solve_learnt_as_a_whole_ends_nearer_than_its_phases_learnt_apart_at_the_same_cost() -> None:
    apart = endpoint_error(phased_loss)
    together = endpoint_error(unrolled_loss, batch=256 // NUM_PHASES, objective="unrolled")  # as many calls
    assert together < 0.65 * apart
