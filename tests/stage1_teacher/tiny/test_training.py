from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.anytext2.checkpoint_file import CheckpointFile
from common.anytext2.conditioning import Hints
from common.anytext2.unet import Control
from common.config import PROJECT_ROOT, load_config
from common.errors import DataError, UsageError
from common.schedule import make_alphas_cumprod
from stage1_teacher.inputs.annotations import Annotations
from stage1_teacher.rendering.rendered_input import RenderSettings, render_input
from stage1_teacher.teacher.glyph_embedding import font_lines
from stage1_teacher.teacher.teacher import Teacher
from stage1_teacher.teacher.text_encoder import encode_tokens
from stage1_teacher.tiny import features, train_position, train_vae
from stage1_teacher.tiny.batches import (
    EDIT_SHARE,
    GRAIN,
    HINT_SHARE,
    JUMP_SHARE,
    JUMPS,
    MAX_EXCESS,
    MAX_OWN_STEPS,
    PATCH,
    SINGLES_SHARE,
    TRAINED_UNMAPPED_SHARE,
    UNTOLD_HINT_SHARE,
    FeatureStore,
    TrainingBatch,
)
from stage1_teacher.tiny.data import write_scene
from stage1_teacher.tiny.export import load_runs, write
from stage1_teacher.tiny.features import FeatureMaker
from stage1_teacher.tiny.ground import CHANCE, Ground, render_ground
from stage1_teacher.tiny.networks import MODEL_FOLDER, WORD_SCALE, build_denoiser, network_config
from stage1_teacher.tiny.scene import SINGLE_LETTERS, draw_scene_plan, recolor
from stage1_teacher.tiny.train_denoiser import Probe, Settings, StepBatches, Trainer, compute_losses, train

VAE_SETTINGS = {"batch_size": 2, "peak": 1e-3, "seed": 0, "num_images": 6, "save_every": 1, "num_fitted": 12}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of two steps, a position encoder, and the features of four layouts, the last of single letters."""
    folder = tmp_path_factory.mktemp("runs")
    train_vae.train(folder / "vae", steps=2, **VAE_SETTINGS)  # type: ignore[arg-type]
    torch.save(train_position.build(64, 0).state_dict(), folder / "position.pt")
    maker = FeatureMaker(folder / "vae")
    scenes = [draw_scene_plan("test", index) for index in range(3)]
    scenes.append(draw_scene_plan("test", 3, lengths=SINGLE_LETTERS))
    layouts = [maker.layout(scene, 2) for scene in scenes]
    (folder / "features").mkdir()
    torch.save(layouts, folder / "features" / "00000.pt")
    return folder


@pytest.fixture
def store(runs: Path) -> FeatureStore:
    """What `runs` has of features."""
    config = network_config()
    store = FeatureStore(runs / "features", build_denoiser(config, 0).embedding.position_encoder, config)
    assert store.refresh() == 4
    return store


def _train(runs: Path, out: Path, steps: int, workers: int = 0) -> dict[str, Any]:
    settings = Settings(
        steps=steps, images=2, noises=2, peak=1e-3, seed=0, patches=3, save_every=1, probe_steps=1, probe_images=4
    )
    train(out, settings, features=runs / "features", vae=runs / "vae", start=runs / "position.pt", workers=workers)
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
    whole = _train(runs, tmp_path / "whole", 4)
    _train(runs, tmp_path / "parts", 2)
    resumed = _train(runs, tmp_path / "parts", 4)
    assert resumed["step"] == 4
    for name, value in whole["weights"].items():
        assert torch.allclose(value, resumed["weights"][name], atol=1e-6), name


def test_batches_are_the_same_whoever_puts_them_together(runs: Path, tmp_path: Path) -> None:
    alone, helped = (_train(runs, tmp_path / str(workers), 2, workers)["weights"] for workers in (0, 1))
    for name, value in alone.items():
        assert torch.allclose(value, helped[name], atol=1e-6), name


def test_the_first_steps_train_what_the_probe_reads_and_leave_the_unet_alone(runs: Path, tmp_path: Path) -> None:
    settings = Settings(steps=9, images=2, noises=2, peak=1e-3, seed=0, probe_steps=1, probe_images=8)
    trainer = Trainer(tmp_path, settings, runs / "position.pt")
    store = FeatureStore(runs / "features", trainer.denoiser.embedding.position_encoder, trainer.config)
    store.refresh()
    batches = StepBatches(store, settings, torch.zeros(16, 24, 24))
    before = {name: value.detach().clone() for name, value in trainer.parameters.items()}

    def moved() -> set[str]:
        trainer.train_step(*batches[trainer.step])
        changed = {n for n, value in trainer.parameters.items() if not torch.equal(value, before[n])}
        return {name.split(".")[0] for name in changed}

    first, _ = batches[0]
    assert len(first.latents) == 8 and len(batches[1][0].latents) == 2
    single = torch.stack([layout["latents"] for layout in store.singles]).flatten(0, 1)
    assert all(bool((image == single).flatten(1).all(1).any()) for image in first.latents)
    assert moved() == {"writenet", "clip", "embedding"}
    assert moved() == {"unet", "writenet", "clip", "embedding"}


def test_steps_that_leave_the_unet_untrained_are_refused() -> None:
    with pytest.raises(UsageError, match="--probe-steps: received 3, expected fewer than --steps, 3"):
        Settings(steps=3, images=1, noises=1, peak=1e-3, seed=0, probe_steps=3)
    with pytest.raises(UsageError, match="--save-every: received 0"):
        Settings(steps=3, images=1, noises=1, peak=1e-3, seed=0, save_every=0)


def test_a_folder_without_layouts_is_refused_in_one_line(runs: Path, tmp_path: Path) -> None:
    settings = Settings(steps=2, images=1, noises=1, peak=1e-3, seed=0)
    given = {"vae": runs / "vae", "start": runs / "position.pt"}
    with pytest.raises(DataError, match=r"received no layouts to train on, expected chunks of .*features"):
        train(tmp_path / "out", settings, features=tmp_path, **given)


def test_features_have_single_letters_only_in_every_third_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "LAYOUTS_PER_FILE", 7)
    monkeypatch.setattr(
        sys,
        "argv",
        [*("features", "--vae", str(MODEL_FOLDER), "--out", str(tmp_path), "--count", "7"), "--variants=1"],
    )
    features.main()
    (chunk,) = [torch.load(path) for path in tmp_path.glob("*.pt")]
    lengths = [item["lengths"].tolist() for item in chunk]
    assert all(set(lengths[index]) == {1} for index in (0, 3, 6))
    assert max(length for index in (1, 2, 4, 5) for length in lengths[index]) > 1


def test_the_glyph_map_lacks_most_single_letters_and_no_longer_lines(store: FeatureStore) -> None:
    lacking = list[bool]()
    for step in range(40):
        batch = store.batch(0, step, images=1, noises=1, blank_latents=torch.zeros(16, 24, 24), singles=True)
        found = [item for item in store.singles if torch.equal(item["coverage"] / 255, batch.coverage[0])]
        rendered = found[0]["glyphs"].float()
        for position in found[0]["positions"].float():
            shown = batch.hints.glyphs[0] * position
            assert not shown.any() or torch.equal(shown, rendered * position)
            lacking.append(not shown.any())
    assert sum(lacking) / len(lacking) == pytest.approx(TRAINED_UNMAPPED_SHARE, abs=0.1)
    for layout in store.layouts:
        layout["lengths"] = torch.full_like(layout["lengths"], 2)
    batch = store.batch(0, 0, images=8, noises=1, blank_latents=torch.zeros(16, 24, 24))
    maps = [layout["glyphs"].float() for layout in store.layouts]
    assert all(any(torch.equal(glyphs, rendered) for rendered in maps) for glyphs in batch.hints.glyphs)


def test_a_fifth_of_the_images_is_of_layouts_of_single_letters(store: FeatureStore) -> None:
    made = [store.batch(0, step, images=9, noises=1, blank_latents=torch.zeros(16, 24, 24)) for step in range(20)]
    singles = [layout["coverage"] / 255 for layout in store.singles]
    found = [any(torch.equal(image, one) for one in singles) for batch in made for image in batch.coverage]
    assert sum(found) / len(found) == pytest.approx(SINGLES_SHARE, abs=0.08)


def test_a_deaf_step_trains_of_the_probes_losses_its_heads_alone(runs: Path, tmp_path: Path) -> None:
    settings = Settings(steps=9, images=4, noises=1, peak=0.0, matrix_peak=0.0, seed=0, heads_only_steps=1)
    trainer = Trainer(tmp_path, settings, runs / "position.pt")
    store = FeatureStore(runs / "features", trainer.denoiser.embedding.position_encoder, trainer.config)
    store.refresh()
    batch = store.batch(0, 0, images=4, noises=1, blank_latents=torch.zeros(16, 24, 24))

    def writenets_gradient(step: int, scale: float) -> torch.Tensor:
        """Of the last residual's convolution, with the probe's targets moved; at rate 0 the weights stay."""
        trainer.step = step
        moved = {name: look * scale for name, look in batch.looks.items()}
        trainer.train_step(replace(batch, looks=moved, coverage=batch.coverage * scale), None)
        assert all(p.grad is not None and p.grad.any() for p in trainer.probe.looks.parameters())
        gradient = trainer.denoiser.writenet.controlnet_mid_block.weight.grad
        assert gradient is not None
        return gradient.clone()

    assert torch.equal(writenets_gradient(0, 1.0), writenets_gradient(0, 0.5))
    assert not torch.allclose(writenets_gradient(1, 1.0), writenets_gradient(1, 0.5), rtol=1e-3)


def test_every_trained_parameter_gets_a_gradient_at_the_first_steps(runs: Path, tmp_path: Path) -> None:
    settings = Settings(steps=9, images=4, noises=2, peak=1e-3, seed=0)
    trainer = Trainer(tmp_path, settings, runs / "position.pt")
    store = FeatureStore(runs / "features", trainer.denoiser.embedding.position_encoder, trainer.config)
    assert store.refresh() == 4
    seen = set[str]()
    for step in range(3):
        batch = store.batch(0, step, images=4, noises=2, blank_latents=torch.zeros(16, 24, 24))
        trainer.train_step(batch, None)
        seen |= {name for name, p in trainer.parameters.items() if p.grad is not None and p.grad.any()}
    missing = set(trainer.parameters) - seen
    # WriteNet's latents are zero by design; a softmax does not change when a key's bias shifts all its scores.
    missing.remove("writenet.conv_in.weight")
    assert all(name.endswith("k_proj.bias") for name in missing), sorted(missing)
    assert all(p.grad is not None and p.grad.any() for p in trainer.probe.parameters())


def test_captions_and_colours_are_heard_before_any_training(store: FeatureStore) -> None:
    config = network_config()
    denoiser = build_denoiser(config, 0)
    batch = store.batch(0, 0, images=4, noises=1, blank_latents=torch.zeros(16, 24, 24))
    with torch.no_grad():
        denoiser.unet.conv_out.weight.normal_(std=0.1)
        others = (Probe(config), batch, make_alphas_cumprod(), config.placeholder_token_id)
        losses = compute_losses(denoiser, *others).eps
        batch.image_tokens.copy_(batch.image_tokens.roll(1, 0))
        other = compute_losses(denoiser, *others).eps
    assert not torch.allclose(losses, other, rtol=1e-4)


def test_the_probe_is_asked_for_each_lines_look_where_it_stands_and_for_no_other(
    store: FeatureStore,
) -> None:
    fonts = {int(font) for layout in store.layouts for font in layout["fonts"]}
    fonts_of_one_line = [layout["fonts"].tolist() for layout in store.layouts if len(layout["fonts"]) == 1]
    told, told_fonts = 0, set[int]()
    for step in range(8):
        batch = store.batch(0, step, images=4, noises=1, blank_latents=torch.zeros(16, 24, 24))
        colors = batch.colors.split(batch.lines)
        for image, lines in enumerate(colors):
            *color, weight = batch.looks["color"][image]
            cells = torch.stack(color)[:, weight > 0].T  # (cells, 3)
            known = lines[lines[:, 0] <= 255] / 127.5 - 1
            told += len(known)
            assert (len(known) == 0) == (len(cells) == 0)
            if len(known) == 1:
                assert torch.allclose(cells, known.expand_as(cells), atol=1e-3)
            *font, weight = batch.looks["font"][image]
            assert bool((weight > 0).any()) == bool(len(lines))
            if len(lines) == 1:
                assert torch.stack(font)[:, weight > 0].argmax(0).unique().tolist() in fonts_of_one_line
            told_fonts |= set(torch.stack(font)[:, weight > 0].argmax(0).tolist())
    assert told > 20 and told_fonts == fonts


def test_the_probe_finds_the_letters_where_a_residual_has_their_pixels(store: FeatureStore) -> None:
    for layout in store.layouts:
        layout["lengths"] = torch.full_like(layout["lengths"], 2)  # all are in the glyph map
    batch = store.batch(0, 0, images=4, noises=1, blank_latents=torch.zeros(16, 24, 24))
    covered = batch.coverage > 0.2
    assert 0.02 < float(covered.float().mean()) < 0.5
    assert float((covered & (batch.hints.glyphs > 0)).sum() / covered.sum()) > 0.95
    probe = Probe(network_config())
    pixels = torch.nn.functional.pixel_unshuffle(batch.coverage, 4)
    control = [torch.zeros(4, 64, size, size) for size in (24, 24, 12, 12, 6, 6, 6)]
    control[0][:, :16] = control[1][:, :16] = pixels
    letters = Probe.READS.index("letters")
    with torch.no_grad():
        for head in probe.letters:
            assert isinstance(head, torch.nn.Conv2d) and head.bias is not None
            head.weight.zero_()
            head.bias.zero_()
            head.weight[range(16), range(16)] = 1
        assert float(probe(tuple(control), batch)[letters]) == 0
        control[0] = control[0].roll(1, -1)
        assert float(probe(tuple(control), batch)[letters]) > 0.3
        nothing = replace(
            batch, coverage=0 * batch.coverage, hints=replace(batch.hints, glyphs=0 * covered.float())
        )
        assert float(probe(tuple(control), nothing)[letters]) == 0


def test_the_probe_looks_for_the_text_in_all_boxes_whose_lines_are_told(store: FeatureStore) -> None:
    batch = store.batch(0, 0, images=4, noises=1, blank_latents=torch.zeros(16, 24, 24))
    probe, read = Probe(network_config()), Probe.READS.index("text")
    pixels = torch.nn.functional.pixel_unshuffle(batch.coverage, 8)
    control = [torch.zeros(4, 64, size, size) for size in (24, 24, 12, 12, 6, 6, 6)]
    inside = torch.nn.functional.max_pool2d(batch.hints.positions, 8)
    with torch.no_grad():
        assert probe.text.bias is not None
        probe.text.weight.copy_(torch.eye(64)[:, :, None, None])
        probe.text.bias.zero_()
        control[3] = pixels * inside + 7 * (1 - inside)  # what is read outside of boxes does not count
        hidden = replace(batch, hints=replace(batch.hints, glyphs=torch.zeros_like(batch.hints.glyphs)))
        assert float(probe(tuple(control), hidden)[read]) == 0
        told = batch.lines.index(max(batch.lines))
        control[3][told] = 7
        assert float(probe(tuple(control), hidden)[read]) > 1
        untold = [count * (image != told) for image, count in enumerate(batch.lines)]
        assert float(probe(tuple(control), replace(hidden, lines=untold))[read]) == 0


def test_the_probe_looks_for_the_image_that_edit_mode_shows_outside_of_the_boxes(store: FeatureStore) -> None:
    blank, probe, read = torch.full((16, 24, 24), 7.0), Probe(network_config()), Probe.READS.index("shown")
    batches = [store.batch(0, step, images=8, noises=1, blank_latents=blank) for step in range(12)]
    edited = torch.cat([batch.shown.amax((1, 2, 3)) for batch in batches])
    assert float(edited.mean()) == pytest.approx(EDIT_SHARE, abs=0.12)
    for batch in batches:
        boxes = torch.nn.functional.max_pool2d(batch.hints.positions, 4)
        assert not bool((batch.shown * boxes).any())
        for masked, latents, shown in zip(batch.hints.masked_latents, batch.latents, batch.shown, strict=True):
            assert torch.equal(masked, blank) != bool(shown.any())
            assert torch.allclose(masked * shown, latents * shown, atol=1e-2)
    batch = batches[0]
    control = [torch.zeros(8, 64, size, size) for size in (24, 24, 12, 12, 6, 6, 6)]
    control[0][:, :16] = control[1][:, :16] = batch.hints.masked_latents
    with torch.no_grad():
        for head in probe.shown:
            assert isinstance(head, torch.nn.Conv2d) and head.bias is not None
            head.weight.zero_()
            head.bias.zero_()
            head.weight[range(16), range(16)] = 1
        assert float(probe(tuple(control), batch)[read]) == 0
        control[0] = control[0] + batch.shown
        assert float(probe(tuple(control), batch)[read]) > 0.05
        control[0] = batch.hints.masked_latents.new_zeros(8, 64, 24, 24)
        nothing = replace(batch, shown=0 * batch.shown)
        assert float(probe(tuple(control), nothing)[read]) == 0


def test_hints_of_an_untold_line_are_cut_from_each_image_as_stage_one_cuts_them(
    runs: Path, tmp_path: Path
) -> None:
    drawn = (draw_scene_plan("untold", index, world=CHANCE) for index in range(250))
    scene = next(scene for scene in drawn if {line.told for line in scene.lines} == {True, False})
    maker = FeatureMaker(runs / "vae")
    layout = maker.layout(scene, 2)
    assert layout["told"].tolist() == [line.told for line in scene.lines]
    config = load_config(PROJECT_ROOT / "configs" / "tiny.toml", ["inputs.font_hint_prob=1"])
    settings = RenderSettings.from_config(config)
    for variant, one in enumerate((scene, recolor(scene, 1))):
        (tmp_path / "imgs").mkdir(exist_ok=True)
        entries = {"data_root": "imgs", "data_list": [write_scene(tmp_path, one, "a.png")]}
        (tmp_path / "data.json").write_text(json.dumps(entries))
        rendered = render_input(Annotations(tmp_path / "data.json", fonts=settings.fonts)[0], settings)
        lines = font_lines(rendered.font_hint, rendered.positions[:, None])
        torch.testing.assert_close(maker.read(lines), layout["hint_features"][variant], atol=2e-2, rtol=1e-2)
        shown = [
            line for line, told in zip(rendered.in_glyph_map, layout["told"].tolist(), strict=True) if not told
        ]
        assert all(shown)
        if all(rendered.in_glyph_map):
            assert torch.equal(rendered.glyphs, layout["glyphs"])
    untold = ~layout["told"]
    same = torch.isclose(layout["hint_features"][0], layout["hint_features"][1], atol=1e-2).flatten(1).all(1)
    assert not bool(same[untold].any())


def test_half_of_the_untold_fonts_are_shown_and_the_probe_is_asked_for_none(store: FeatureStore) -> None:
    for layout in store.layouts:
        layout["told"] = torch.zeros(len(layout["lengths"])).bool()
        layout["hint_features"] = torch.ones_like(layout["hint_features"])
        layout["blank_features"] = torch.zeros_like(layout["blank_features"])
    batches = [
        store.batch(0, step, images=8, noises=1, blank_latents=torch.zeros(16, 24, 24)) for step in range(20)
    ]
    shown = torch.cat([batch.font_features.flatten(1).amax(1) for batch in batches])
    assert float(shown.mean()) == pytest.approx(HINT_SHARE * UNTOLD_HINT_SHARE, abs=0.1)
    assert not any(bool(batch.looks["font"][:, -1].any()) for batch in batches)
    assert all(bool(batch.looks["color"][:, -1].any()) for batch in batches)


def test_training_goes_on_from_a_whole_teachers_weights(runs: Path, tmp_path: Path) -> None:
    _train(runs, tmp_path / "denoiser", 2)
    trained = load_runs(runs / "vae", tmp_path / "denoiser", runs / "position.pt", averaged=False)
    write(trained, tmp_path / "out")
    settings = Settings(steps=2, images=2, noises=1, peak=1e-3, seed=5)
    further = Trainer(tmp_path / "further", settings, tmp_path / "out")
    words = "clip.embeddings.token_embedding.weight"
    for name, value in trained.denoiser.named_parameters().items():
        known = (value != 0).any(1) if name == words else slice(None)
        assert torch.allclose(further.parameters[name][known], value[known], rtol=1e-3, atol=2e-3), name
    unknown = (trained.denoiser.named_parameters()[words] == 0).all(1)
    assert unknown.any() and not unknown.all()
    assert float(further.parameters[words][unknown].std()) == pytest.approx(WORD_SCALE, rel=0.05)
    assert further.parameters["unet.conv_out.weight"].requires_grad


def test_the_glyph_block_starts_by_handing_on_each_pixel() -> None:
    denoiser = build_denoiser(network_config(), 0)
    glyphs = (torch.rand(1, 1, 96, 96, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    with torch.no_grad():
        handed_on = denoiser.writenet.controlnet_cond_embedding.glyph_block(glyphs)[:, :16]
    pixels = torch.nn.functional.pixel_unshuffle(glyphs, 4)
    found = (handed_on.flatten(2)[0] - pixels.flatten(2)[0][:, None]).abs().amax(-1).min(0)
    assert float(found.values.max()) < 1e-4 and len(found.indices.unique()) == 16


def test_the_unet_starts_by_taking_all_noise_for_noise_however_much_there_is() -> None:
    unet = build_denoiser(network_config(), 0).unet
    g = torch.Generator().manual_seed(0)
    context = torch.randn(2, 77, 64, generator=g)
    for size in (1.0, 1.1, 1.5):
        z = size * torch.randn(2, 16, 24, 24, generator=g)
        with torch.no_grad():
            eps = unet(z, torch.tensor([100, 900]), context)
        assert float((eps * z).mean() / z.square().mean()) == pytest.approx(1, abs=0.02)


@pytest.fixture
def grainy(store: FeatureStore) -> TrainingBatch:
    return store.batch(0, 0, images=4, noises=4, blank_latents=torch.zeros(16, 24, 24))


@pytest.mark.parametrize(
    ("share", "own_steps", "length"), [(0, 1, 0), (1, 1, 100), (1, 3, 100), (2, 2, 100), (1, 3, 1)]
)
def test_all_but_the_picture_is_asked_for_with_grain_and_after_own_steps(
    grainy: TrainingBatch, share: int, own_steps: int, length: int
) -> None:
    """A UNet that knows the picture loses nothing on its way to no noise, to all, or to every second one."""
    config, batch, cumulative = network_config(), grainy, make_alphas_cumprod()
    denoiser = build_denoiser(config, 0)
    with torch.no_grad():
        contexts = encode_tokens(denoiser.clip, batch.image_tokens)
    jumps = (999 - batch.timesteps).clamp(max=length)
    assert length == 0 or int(jumps.min()) > 0
    if share == 2:
        jumps[::2] = 0
    jumping = jumps > 0
    calls = list[tuple[torch.Tensor, torch.Tensor]]()

    def count_images(hints: Hints, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        image = torch.arange(len(hints.glyphs)).float()[:, None, None, None]
        return tuple(image.expand(-1, 64, size, size) for size in (24, 24, 12, 12, 6, 6, 6))

    def all_but_the_picture(
        noisy: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, control: Control
    ) -> torch.Tensor:
        calls.append((noisy, timesteps))
        images = control[0][:, 0, 0, 0].long()
        assert all(bool((part[:, 0, 0, 0] == images).all()) for part in control)
        assert torch.allclose(context, contexts[images], atol=1e-5)
        level = cumulative[timesteps][:, None, None, None]
        return (noisy - level.sqrt() * batch.latents[images]) / (1 - level).sqrt()

    def at(timesteps: torch.Tensor, grain: torch.Tensor) -> torch.Tensor:
        level = cumulative[timesteps][:, None, None, None]
        clean = batch.latents.repeat_interleave(4, dim=0)
        return level.sqrt() * (clean + grain) + (1 - level).sqrt() * batch.noise

    knowing = replace(denoiser, unet=all_but_the_picture, writenet=count_images)  # type: ignore[arg-type]
    case = replace(batch, jumps=jumps, own_steps=own_steps)
    with torch.no_grad():
        losses = compute_losses(knowing, Probe(config), case, cumulative, config.placeholder_token_id)
    assert float(losses.eps.max()) < 1e-3
    ways = [batch.timesteps + jumps * left // own_steps for left in range(own_steps, 0, -1)] if share else []
    expected = [(at(when, torch.zeros(()))[jumping], when[jumping]) for when in ways]
    grain = batch.grain * ~jumping[:, None, None, None]
    expected.append((at(batch.timesteps, grain), batch.timesteps))
    for (noisy, timesteps), (wanted, when) in zip(calls, expected, strict=True):
        assert torch.equal(timesteps, when)
        assert torch.allclose(noisy, wanted, atol=1e-3)


def test_grain_and_own_steps_keep_to_their_limits(grainy: TrainingBatch, store: FeatureStore) -> None:
    level = make_alphas_cumprod()[grainy.timesteps][:, None, None, None]
    excess = grainy.grain.std(dim=(1, 2, 3)) * (level / (1 - level)).sqrt().flatten()
    assert 4 <= int((excess > 0).sum()) <= 12
    assert float(excess.max()) < MAX_EXCESS * 1.1
    assert float(grainy.grain.std(dim=(1, 2, 3)).max()) < GRAIN * 1.1
    made = [store.batch(0, step, images=4, noises=4, blank_latents=torch.zeros(16, 24, 24)) for step in range(9)]
    rendered = torch.cat([item.jumps for item in made])
    ends = rendered + torch.cat([item.timesteps for item in made])
    assert {item.own_steps for item in made} == set(range(1, MAX_OWN_STEPS + 1))
    assert float((rendered > 0).float().mean()) == pytest.approx(JUMP_SHARE, abs=0.12)
    assert int(ends.max()) <= 999 and int(rendered.max()) <= JUMPS[1]
    assert int(rendered[(rendered > 0) & (ends < 999)].min()) >= JUMPS[0]


def test_small_letters_count_more_than_large_ones_and_these_more_than_the_ground(store: FeatureStore) -> None:
    masks = torch.zeros(2, 96, 96, dtype=torch.uint8)
    masks[0, 4:20, 8:88], masks[1, 40:80, 8:88] = 1, 1
    for layout in store.layouts:
        layout.update(positions=masks, fonts=torch.zeros(2, dtype=torch.int64), lengths=torch.tensor([4, 4]))
        of_lines = [name for name in layout if name.endswith("_features") and name != "hint_features"]
        layout.update({name: layout[name][:1].repeat(2, 1, 1) for name in of_lines})
        layout.update(hint_features=layout["hint_features"][:, :1].repeat(1, 2, 1, 1), told=torch.ones(2).bool())
        layout.update(where=layout["where"][:1].repeat(2, 1), colors=layout["colors"][:, :1].repeat(1, 2, 1))
    weight = store.batch(0, 0, images=2, noises=1, blank_latents=torch.zeros(16, 24, 24)).weight[0, 0]
    ground, small, large = weight[23, 0], weight[3, 10], weight[15, 10]
    assert float(small / ground) == pytest.approx(31) and float(large / ground) == pytest.approx(6)


def test_an_earlier_versions_checkpoint_is_refused_in_one_line(runs: Path, tmp_path: Path) -> None:
    _train(runs, tmp_path / "denoiser", 2)
    path = tmp_path / "denoiser" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    del saved["probe"]["letters.0.weight"]
    torch.save(saved, path)
    with pytest.raises(DataError, match=r"checkpoint.pt: received an earlier version's training state.*--out"):
        _train(runs, tmp_path / "denoiser", 3)


def test_a_patch_has_the_ground_as_the_image_has_it_from_its_edge_on(store: FeatureStore) -> None:
    ground = render_ground(Ground(kind="checked", colors=("red",), vertical=False), 96)
    pixels = torch.from_numpy(ground).permute(2, 0, 1).float()
    for layout in store.layouts:
        # Latents that are the ground itself, one pixel of a cell.
        layout.update(latents=pixels[:1, ::4, ::4].expand(len(layout["latents"]), 16, 24, 24))
    patches = store.patches(0, 0, images=24, blank_latents=torch.zeros(16, 24, 24))
    assert bool((patches.latents == pixels[:1, :PATCH:4, :PATCH:4]).all())
    assert len({tuple(patch.flatten().tolist()) for patch in patches.hints.positions}) > 3


def test_an_earlier_versions_chunk_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save([{"latents": torch.zeros(1)}], tmp_path / "00000.pt")
    config = network_config()
    store = FeatureStore(tmp_path, build_denoiser(config, 0).embedding.position_encoder, config)
    with pytest.raises(
        DataError, match=r"00000.pt: received layouts that do not say whose fonts are told.*remove its folder"
    ):
        store.refresh()


def test_a_batch_is_keyed_by_seed_and_step(store: FeatureStore) -> None:
    blank = torch.zeros(16, 24, 24)
    first, again, other = (store.batch(0, step, images=3, noises=2, blank_latents=blank) for step in (5, 5, 6))
    assert torch.equal(first.noise, again.noise) and torch.equal(first.latents, again.latents)
    assert not torch.equal(first.noise, other.noise)


def test_patches_show_the_ground_at_high_noise_and_tell_it_by_the_caption_alone(store: FeatureStore) -> None:
    blank = torch.full((16, 24, 24), 7.0)
    batch = store.patches(0, 5, images=6, blank_latents=blank)
    assert batch.latents.shape == (6, 16, 8, 8) and batch.hints.glyphs.shape == (6, 1, 32, 32)
    assert batch.lines == [0] * 6 and len(batch.colors) == 0
    assert int(batch.timesteps.min()) >= 600
    assert bool((batch.hints.masked_latents == 7).all())
    assert not bool((batch.image_tokens == store.empty_tokens).all(dim=1).any())
    assert bool((batch.text_tokens == store.empty_tokens).all())


def test_an_exported_run_is_a_whole_teacher_that_computes_the_same(runs: Path, tmp_path: Path) -> None:
    _train(runs, tmp_path / "denoiser", 2)
    trained = load_runs(runs / "vae", tmp_path / "denoiser", runs / "position.pt", averaged=False)
    write(trained, tmp_path / "out")
    assert max(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 25e6
    teacher = Teacher.from_checkpoint(network_config(), CheckpointFile(tmp_path / "out"), MODEL_FOLDER / "clip")
    z, t, context = torch.randn(1, 16, 24, 24), torch.tensor([500]), torch.randn(1, 77, 64)
    with torch.no_grad():
        ours, theirs = trained.denoiser.unet(z, t, context), teacher.denoiser.unet(z, t, context)
    assert torch.allclose(theirs, ours, atol=1e-2)
