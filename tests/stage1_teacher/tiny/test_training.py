from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.anytext2.checkpoint import CheckpointFile
from common.schedule import make_alphas_cumprod
from stage1_teacher.teacher import Teacher
from stage1_teacher.tiny import train_position, train_vae
from stage1_teacher.tiny.batches import FeatureStore
from stage1_teacher.tiny.export import load_runs, write
from stage1_teacher.tiny.features import FeatureMaker
from stage1_teacher.tiny.networks import MODEL_FOLDER, build_denoiser, network_config
from stage1_teacher.tiny.scene import draw_scene_plan
from stage1_teacher.tiny.train_denoiser import Settings, Trainer, denoising_losses, train

VAE_SETTINGS = {"batch_size": 2, "peak": 1e-3, "seed": 0, "num_images": 6, "save_every": 1, "num_fitted": 12}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of two steps, a position encoder, and the features of four layouts."""
    folder = tmp_path_factory.mktemp("runs")
    train_vae.train(folder / "vae", steps=2, **VAE_SETTINGS)  # type: ignore[arg-type]
    torch.save(train_position.build(64, 0).state_dict(), folder / "position.pt")
    maker = FeatureMaker(folder / "vae")
    layouts = [maker.layout(draw_scene_plan("test", index), 2, with_hint=index == 0) for index in range(4)]
    (folder / "features").mkdir()
    torch.save(layouts, folder / "features" / "00000.pt")
    return folder


def _train(runs: Path, out: Path, steps: int) -> dict[str, Any]:
    settings = Settings(steps=steps, images=2, noises=2, peak=1e-3, seed=0, crop_steps=1, save_every=1)
    train(out, settings, features=runs / "features", vae=runs / "vae", position=runs / "position.pt")
    saved: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return saved


def test_vae_training_that_is_stopped_and_resumed_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    train_vae.train(tmp_path / "whole", steps=2, **VAE_SETTINGS)  # type: ignore[arg-type]
    # Stopped after the first of the two steps: the schedule must know of both.
    stopped = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    assert stopped["step"] == 2
    train_vae.train(tmp_path / "parts", steps=1, **VAE_SETTINGS)  # type: ignore[arg-type]
    train_vae.train(tmp_path / "parts", steps=2, **VAE_SETTINGS)  # type: ignore[arg-type]
    resumed = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    for name, value in stopped["vae"].items():
        assert torch.equal(value, resumed["vae"][name]), name


def test_denoiser_training_that_is_resumed_ends_where_an_uninterrupted_one_does(
    runs: Path, tmp_path: Path
) -> None:
    whole = _train(runs, tmp_path / "whole", 3)
    _train(runs, tmp_path / "parts", 1)
    resumed = _train(runs, tmp_path / "parts", 3)
    assert resumed["step"] == 3
    for name, value in whole["weights"].items():
        assert torch.allclose(value, resumed["weights"][name], atol=1e-6), name


def test_every_trained_parameter_gets_a_gradient_at_the_first_steps(runs: Path, tmp_path: Path) -> None:
    settings = Settings(steps=9, images=4, noises=2, peak=1e-3, seed=0, crop_steps=0)
    trainer = Trainer(tmp_path, settings, runs / "position.pt")
    store = FeatureStore(runs / "features", trainer.denoiser.embedding.position_encoder, trainer.config)
    assert store.refresh() == 4
    seen = set[str]()
    for step in range(3):
        batch = store.batch(0, step, images=4, noises=2, blank_latents=torch.zeros(16, 24, 24))
        trainer.train_step(batch, make_alphas_cumprod())
        seen |= {name for name, p in trainer.parameters.items() if p.grad is not None and p.grad.any()}
    missing = set(trainer.parameters) - seen
    # WriteNet's latents are zero by design; a softmax does not change when a key's bias shifts all its scores.
    missing.remove("writenet.conv_in.weight")
    assert all(name.endswith("k_proj.bias") for name in missing), sorted(missing)


def test_captions_and_colours_are_heard_before_any_training(runs: Path) -> None:
    config = network_config()
    denoiser = build_denoiser(config, 0)
    store = FeatureStore(runs / "features", denoiser.embedding.position_encoder, config)
    store.refresh()
    batch = store.batch(0, 0, images=4, noises=1, blank_latents=torch.zeros(16, 24, 24))
    with torch.no_grad():
        denoiser.unet.conv_out.weight.normal_(std=0.1)
        losses = denoising_losses(denoiser, batch, make_alphas_cumprod(), config.placeholder_token_id)
        batch.image_tokens.copy_(batch.image_tokens.roll(1, 0))
        other = denoising_losses(denoiser, batch, make_alphas_cumprod(), config.placeholder_token_id)
    assert not torch.allclose(losses, other, rtol=1e-4)


def test_a_batch_is_keyed_by_seed_and_step(runs: Path) -> None:
    config = network_config()
    store = FeatureStore(runs / "features", build_denoiser(config, 0).embedding.position_encoder, config)
    store.refresh()
    blank = torch.zeros(16, 24, 24)
    first, again, other = (store.batch(0, step, images=3, noises=2, blank_latents=blank) for step in (5, 5, 6))
    assert torch.equal(first.noise, again.noise) and torch.equal(first.latents, again.latents)
    assert not torch.equal(first.noise, other.noise)
    cropped = store.batch(0, 5, images=3, noises=2, blank_latents=blank, side=64)
    assert cropped.latents.shape == (3, 16, 16, 16) and cropped.hints.glyphs.shape == (3, 1, 64, 64)


def test_an_exported_run_is_a_whole_teacher_that_computes_the_same(runs: Path, tmp_path: Path) -> None:
    _train(runs, tmp_path / "denoiser", 1)
    trained = load_runs(runs / "vae", tmp_path / "denoiser", runs / "position.pt", averaged=False)
    write(trained, tmp_path / "out")
    assert max(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 25e6
    teacher = Teacher.from_checkpoint(network_config(), CheckpointFile(tmp_path / "out"), MODEL_FOLDER / "clip")
    z, t, context = torch.randn(1, 16, 24, 24), torch.tensor([500]), torch.randn(1, 77, 64)
    with torch.no_grad():
        ours = trained.denoiser.unet(z, t, context)
    assert torch.allclose(teacher.eps(z, t, context, None), ours, atol=1e-2)
