"""All commands from prompts to pictures, on a teacher small enough to make up in a second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open

from common.anytext2.denoiser import guide, predict_branches
from common.config import load_config
from common.ddim import integrate, trailing_grid
from pipeline import cli
from shards.reading.reader import ShardSet
from stage2_student.student.student import load_base
from tests.stage1_teacher.small_teacher import write_prompts, write_teacher

TRAINING = ("train.num_phases=2", "train.max_steps=2", "train.batch_size=2", "train.num_workers=0", "lora.rank=2")
SIDE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    config: Path
    shards: Path
    run: Path


def call(*arguments: object, sets: tuple[str, ...] = ()) -> Result:
    flags = [flag for value in sets for flag in ("--set", value)]
    return CliRunner().invoke(cli, [*map(str, arguments), *flags])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("end_to_end")
    torch.set_num_threads(1)
    config, prompts = write_teacher(folder), write_prompts(folder / "prompts.jsonl", 4)
    shards, run = folder / "shards", folder / "run"
    made = call("precompute", "--config", config, "--prompts", prompts, "--out", shards)
    assert made.exit_code == 0, made.output
    trained = call("train", "--config", config, "--shards", shards, "--out", run, sets=TRAINING)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert trained.exit_code == 0, trained.output
    assert "to_q" in trained.output and "checkpoint" in trained.output
    return Place(config=config, shards=shards, run=run)


def picture(path: Path) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(Image.open(path))


def test_a_student_draws_a_prompt_and_the_teacher_stands_beside_it(place: Place, tmp_path: Path) -> None:
    prompt = ("--prompt", 'a sign that says "OPEN"', "--box", "8,16,56,40", "--color", "#d01818")
    base = ("sample", "--config", place.config, *prompt)
    assert call(*base, "--adapter", place.run, "--out", tmp_path / "student.png").exit_code == 0
    assert call(*base, "--teacher", "--out", tmp_path / "teacher.png").exit_code == 0
    compared = call(*base, "--adapter", place.run, "--compare", "--out", tmp_path / "both.png")
    assert compared.exit_code == 0, compared.output
    both = picture(tmp_path / "both.png")
    assert np.array_equal(both[:, :SIDE], picture(tmp_path / "teacher.png"))
    assert np.array_equal(both[:, -SIDE:], picture(tmp_path / "student.png"))
    assert not np.array_equal(both[:, :SIDE], both[:, -SIDE:])


def test_a_record_is_drawn_from_the_noise_that_the_teacher_had(place: Place, tmp_path: Path) -> None:
    base = ("sample", "--config", place.config, "--record", "2", "--shards", place.shards)
    result = call(*base, "--adapter", place.run, "--compare", "--out", tmp_path / "both.png")
    assert result.exit_code == 0, result.output
    assert call(*base, "--teacher", "--out", tmp_path / "teacher.png").exit_code == 0
    recorded, solved = picture(tmp_path / "both.png")[:, :SIDE], picture(tmp_path / "teacher.png")
    # The same noise, conditioning and grid; the record rounded its states to float16.
    assert np.abs(recorded.astype(int) - solved.astype(int)).max() <= 8


def test_images_are_numbered_and_each_has_its_own_noise(place: Place, tmp_path: Path) -> None:
    base = ("sample", "--config", place.config, "--record", "0", "--shards", place.shards, "--adapter", place.run)
    result = call(*base, "--seed", "3", "--num-images", "2", "--out", tmp_path / "a.png")
    assert result.output.split() == [str(tmp_path / "a_0.png"), str(tmp_path / "a_1.png")]
    first = picture(tmp_path / "a_0.png")
    assert not np.array_equal(first, picture(tmp_path / "a_1.png"))
    assert call(*base, "--seed", "3", "--out", tmp_path / "again.png").exit_code == 0
    assert np.abs(picture(tmp_path / "again.png").astype(int) - first.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--teacher", "--adapter", "RUN", "--record", "0", "--shards", "SHARDS"),
            "one of --adapter RUN and --teacher",
        ),
        (("--adapter", "RUN"), "sample what"),
        (("--adapter", "RUN", "--record", "0"), "sample what"),
        (("--adapter", "RUN", "--record", "0", "--shards", "SHARDS", "--steps", "4"), "trained for 2 steps"),
        (("--adapter", "RUN", "--record", "99", "--shards", "SHARDS"), "holds records 0 to 3"),
        (("--adapter", "RUN", "--record", "0", "--shards", "SHARDS", "--num-images", "2"), "give --seed"),
        (
            ("--adapter", "RUN", "--record", "0", "--shards", "SHARDS", "--seed", "1", "--compare"),
            "leave --seed out",
        ),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    place: Place, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    known = {"RUN": str(place.run), "SHARDS": str(place.shards)}
    given = [known.get(argument, argument) for argument in arguments]
    result = call("sample", "--config", place.config, *given, "--out", tmp_path / "x.png")
    assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "merged"])
def test_a_student_is_exported_with_the_timesteps_to_sample_it_at(place: Place, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "student.safetensors"
    result = call("export", "--config", place.config, "--adapter", place.run, "--format", kind, "--out", out)
    assert result.exit_code == 0, result.output
    assert "2 ddim steps at t = [999, 499]" in result.output
    with safe_open(out, "pt") as file:
        names = set(file.keys())
    prefix = {"diffusers": "unet.", "kohya": "lora_unet_", "merged": "model.diffusion_model."}[kind]
    assert any(name.startswith(prefix) for name in names)


def test_a_comparison_shows_layout_teacher_and_student_of_each_record(place: Place, tmp_path: Path) -> None:
    base = ("compare", "--config", place.config, "--shards", place.shards, "--adapter", place.run)
    result = call(*base, "--records", "0,2", "--out", tmp_path / "grid.png")
    assert result.exit_code == 0, result.output
    grid = Image.open(tmp_path / "grid.png")
    tile = 3 * SIDE  # small images are enlarged
    assert grid.width >= 4 * tile and grid.height >= 2 * tile
    shown = np.asarray(grid)[-tile:]
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 100

    refused = call(*base, "--records", "0,99", "--out", tmp_path / "none.png")
    assert refused.exit_code == 2
    assert "the set holds records 0 to 3" in refused.output

    # How the set was recorded counts, not what the configuration says by now.
    sets = ("precompute.guidance_scale=9", "precompute.solver_steps=16")
    again = call(*base, "--records", "0,2", "--out", tmp_path / "again.png", sets=sets)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


def test_a_comparison_with_a_set_of_another_base_is_refused(place: Place, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = write_teacher(tmp_path / "other", seed="1")
    wrong = ("--config", other, "--shards", place.shards, "--adapter", place.run, "--out", tmp_path / "none.png")
    refused = call("compare", *wrong)
    assert refused.exit_code == 3
    assert "the set: the shards were recorded on the base" in refused.output


def test_the_teacher_solves_the_same_from_shards_alone_as_in_stage_one(place: Place) -> None:
    config = load_config(place.config)
    shards = ShardSet.open(place.shards)
    records = [shards[index] for index in range(len(shards))]
    base, _ = load_base(config, torch.float32, "cpu")
    recorded = torch.stack([record.rollout_latents[0].float() for record in records])
    predict = predict_branches(base, [record.conditioning for record in records], shards.uncond)
    grid = trailing_grid(config.precompute.solver_steps)
    solved = integrate(guide(predict, config.precompute.guidance_scale), recorded[:, 0], grid)
    # The recorded solve went on from float16 states; that is all of the difference.
    error = (solved - recorded[:, -1]).norm() / recorded[:, -1].norm()
    assert error < 0.01
