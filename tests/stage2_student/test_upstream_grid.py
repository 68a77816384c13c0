"""A student of AnyText2's own grid, merged and sampled by that program's arithmetic alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from common.anytext2.checkpoint import load_denoiser, load_vae
from common.anytext2.config import NetworkConfig
from common.config import PROJECT_ROOT
from common.errors import UsageError
from stage2_student.student.adapter import read_card
from stage2_student.student.export import export
from stage2_student.student.sample import LoadedStudent, decode
from stage2_student.train import train
from tests.parity import read_golden
from tests.stage2_student.conftest import Configure, make_record, stack
from tests.stage2_student.student.test_sample import SD15, SHAPE
from tests.upstream_program import upstream_alphas_cumprod, upstream_ddim

STEPS = 4


def test_the_formulas_are_upstreams() -> None:
    """Given the eps of its own five steps, they land where it landed."""
    golden = read_golden(PROJECT_ROOT / "tests/golden/tiny.safetensors")
    table, states, x0s = upstream_alphas_cumprod(), golden["ddim5.x_inter"], golden["ddim5.pred_x0"]
    called: list[int] = []

    def predict(z: Tensor, t: Tensor) -> Tensor:
        torch.testing.assert_close(z, states[len(called)], rtol=1e-3, atol=1e-3)
        called.append(int(t[0]))
        a = table[t].view(-1, 1, 1, 1)
        return (states[len(called) - 1] - a.sqrt() * x0s[len(called)]) / (1 - a).sqrt()

    samples = upstream_ddim(predict, golden["in.noise"], 5, table)
    assert called == [801, 601, 401, 201, 1]
    torch.testing.assert_close(samples, golden["ddim5.samples"], rtol=1e-3, atol=1e-3)


@pytest.fixture
def run(configure: Configure, shards: Path, tmp_path: Path) -> Path:
    config = configure(num_phases=STEPS, grid="upstream", max_steps=3, learning_rate=0.05, warmup_steps=0)
    return train(config, shards=shards, run=tmp_path / "run").run


def test_a_merged_student_gives_the_same_images_in_upstreams_own_program(
    configure: Configure, network: NetworkConfig, run: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged.safetensors"
    export(configure(), run, "merged", merged)
    conditioning = stack([make_record(index) for index in range(3)]).to("cpu", torch.float32)
    sampler = LoadedStudent.load(configure(), run)
    noise = sampler.noise(0, [0, 1, 2], SHAPE)
    ours = sampler.latents(conditioning, noise)

    denoiser, vae = load_denoiser(network, merged), load_vae(network, merged)
    control = denoiser.control(conditioning)
    called: list[int] = []

    @torch.no_grad()
    def predict(z: Tensor, t: Tensor) -> Tensor:
        called.append(int(t[0]))
        return denoiser(z, t, conditioning, control)

    table = upstream_alphas_cumprod()
    theirs = upstream_ddim(predict, noise[:, 0], STEPS, table)
    assert called == [751, 501, 251, 1]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    pictures = zip(decode(vae, ours), decode(vae, theirs), strict=True)
    assert max(int(np.abs(a.astype(int) - b).max()) for a, b in pictures) <= 1

    # In half precision that program rounds its table, which moves the end a little and the images hardly.
    rounded = upstream_ddim(predict, noise[:, 0], STEPS, table.half().float())
    moved = float((rounded - theirs).norm() / theirs.norm())
    assert 1e-5 < moved < 0.01

    for file in (merged, run):
        card = read_card(file if file.is_file() else file / "checkpoints/step-00000003/lora")
        assert (card.grid, card.timesteps, card.sampler) == ("upstream", (751, 501, 251, 1), "ddim")
    torch.testing.assert_close(LoadedStudent.load(configure(), merged).latents(conditioning, noise), ours)


def test_stock_diffusers_samples_it_with_leading_steps(configure: Configure, run: Path) -> None:
    sampler = LoadedStudent.load(configure(), run)
    conditioning = stack([make_record(0)]).to("cpu", torch.float32)
    noise = sampler.noise(0, [0], SHAPE)
    scheduler = DDIMScheduler(**SD15, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == [751, 501, 251, 1]
    z = noise[:, 0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(sampler.student(z, t.expand(1), conditioning), t, z).prev_sample
    torch.testing.assert_close(sampler.latents(conditioning, noise), z, rtol=1e-4, atol=1e-4)


def test_shards_without_states_near_its_timesteps_are_refused(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="within 5 of t = 626"):
        train(configure(num_phases=8, grid="upstream"), shards=shards, run=tmp_path / "run")
