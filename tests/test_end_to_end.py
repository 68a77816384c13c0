"""All commands from prompts to pictures, on a teacher small enough to make up in a second."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner, Result
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from safetensors import safe_open

from common.anytext2.denoiser import guide, predict_branches
from common.config import load_config
from common.ddim import integrate, trailing_grid
from pipeline import cli
from shards.reading.reader import ShardSet
from stage2_student.student.student import load_base
from tests.fresh_student import write_fresh_student
from tests.stage1_teacher.small_teacher import FONT, write_prompts, write_teacher

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
    AcceleratorState._reset_state(reset_partial_state=True)  # whatever ran before in this process
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
        (
            ("--adapter", "RUN", "--record", "0", "--shards", "SHARDS", "--box", "8,16,56,40", "--font", "x"),
            "received --box, --font, which would be ignored",
        ),
        (("--adapter", "RUN", "--prompts", "x.jsonl", "--image", "x.png"), "received --image, which would be"),
        (("--adapter", "RUN", "--record", "0", "--shards", "SHARDS", "--size", "64x64"), "received --size"),
        (("--teacher", "--prompt", "a sign", "--shards", "SHARDS"), "sample what"),
        (("--adapter", "RUN", "--prompt", "a sign", "--size", "64"), "expected WIDTHxHEIGHT in pixels"),
        (("--adapter", "RUN", "--prompt", "a sign", "--size", "100x64"), "in multiples of 16"),
        (("--adapter", "RUN", "--prompt", 'a 5" pipe with "OPEN"', "--box", "8,16,56,40"), "one --text beside"),
        (("--adapter", "RUN", "--prompt", "a sign", "--grid", "x.pdf"), "--grid x.pdf: received a .pdf file"),
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


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("sample", ("--teacher", "--prompt", "a sign", "--out", "x.jpg")),
        ("compare", ("--shards", "SHARDS", "--adapter", "RUN", "--out", "x.jpg")),
        ("inspect", ("--shards", "SHARDS", "--out", "x.pdf")),
        ("report", ("--evaluation", "x", "--out", "x.pdf")),
    ],
)
def test_a_name_that_says_another_format_is_refused(
    place: Place, command: str, arguments: tuple[str, ...]
) -> None:
    known = {"RUN": str(place.run), "SHARDS": str(place.shards)}
    result = call(command, *[known.get(argument, argument) for argument in arguments])
    assert result.exit_code == 2 and "which is what would be in it" in result.output


@pytest.mark.parametrize(
    ("command", "option", "value"), [("inspect", "--records", "2"), ("verify", "--tolerance", "0.1")]
)
def test_options_that_would_be_ignored_are_refused(place: Place, command: str, option: str, value: str) -> None:
    result = call(command, "--shards", place.shards, option, value)
    assert result.exit_code == 2 and f"received {option}, which would be ignored" in result.output


def test_a_quick_demo_refuses_what_it_sets_itself(tmp_path: Path) -> None:
    result = call("demo", "--quick", "--steps", "9", "--out", tmp_path / "demo")
    assert result.exit_code == 2 and "received --steps, which would be ignored: --quick sets it" in result.output


def said(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        assert image.format == "PNG" and isinstance(image, PngImageFile)
        return dict(image.text)


PROMPTS = (
    {"caption": 'a sign that says "OPEN"', "lines": [{"text": "OPEN", "box": [8.0, 16.0, 56.0, 40.0]}]},
    {
        "caption": "\u4e00\u5f20\u6d77\u62a5",
        "seed": 5,
        "lines": [
            {"text": "A", "polygon": [[4, 4], [60, 6], [60, 30], [4, 28]], "color": "#d01818", "font": str(FONT)},
            {"text": "B", "box": [4, 36, 60, 60], "color": "#1818d0"},
        ],
    },
    {"caption": "no text", "lines": []},
)


def test_a_file_of_prompts_is_sampled_line_by_line(place: Place, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    base = ("sample", "--config", place.config, "--adapter", place.run, "--seed", "3")
    out, grid = tmp_path / "images", tmp_path / "grid.png"
    result = call(
        *base, "--prompts", tmp_path / "prompts.jsonl", "--num-images", "2", "--out", out, "--grid", grid
    )
    assert result.exit_code == 0, result.output
    names = [f"{line:04}_{number}.png" for line in range(3) for number in range(2)]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [said(out / name)["seed"] for name in names] == ["3", "3", "5", "5", "3", "3"]
    assert [said(out / name)["image"] for name in names] == ["0", "1"] * 3
    lines = json.loads(said(out / "0001_0.png")["lines"])
    assert [(line["text"], line["color"]) for line in lines] == [("A", [208, 24, 24]), ("B", [24, 24, 208])]
    assert lines[0]["polygon"] == PROMPTS[1]["lines"][0]["polygon"]  # type: ignore[index]
    assert said(out / "0001_0.png")["prompt"] == PROMPTS[1]["caption"]
    tile = picture(out / "0001_1.png")
    assert np.array_equal(picture(grid)[70 + 6 : 70 + 6 + SIDE, 70 + 6 : 70 + 6 + SIDE], tile)
    assert json.loads(said(grid)["seed"]) == ["3", "3", "5", "5", "3", "3"]

    # A line comes out as the same prompt typed alone.
    typed = ("--prompt", PROMPTS[0]["caption"], "--box", "8,16,56,40", "--num-images", "2")
    assert call(*base, *typed, "--out", tmp_path / "typed.png").exit_code == 0
    assert np.array_equal(picture(tmp_path / "typed_1.png"), picture(out / "0000_1.png"))
    assert said(tmp_path / "typed_1.png") == said(out / "0000_1.png")


def test_nothing_is_sampled_of_a_file_with_a_wrong_prompt(place: Place, tmp_path: Path) -> None:
    outside = {"caption": "x", "lines": [{"text": "A", "box": [900, 900, 950, 950]}]}
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in (*PROMPTS, outside)))
    arguments = ("--teacher", "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "images")
    result = call("sample", "--config", place.config, *arguments)
    assert (
        result.exit_code == 3
        and "prompts.jsonl:4: line 'A': polygon reaches far out of the image" in result.output
    )
    assert not (tmp_path / "images").exists()


def test_each_picture_says_who_sampled_it(place: Place, tmp_path: Path) -> None:
    base = ("sample", "--config", place.config, "--record", "1", "--shards", place.shards)
    assert call(*base, "--adapter", place.run, "--compare", "--out", tmp_path / "s.png").exit_code == 0
    assert call(*base, "--teacher", "--seed", "4", "--out", tmp_path / "t.png").exit_code == 0
    record = ShardSet.open(place.shards)[1].meta
    student, teacher = said(tmp_path / "s.png"), said(tmp_path / "t.png")
    assert student["prompt"] == teacher["prompt"] == record.caption and student["record"] == record.input_id
    assert (student["seed"], student["noise"], teacher["seed"]) == (str(record.seeds[0]), "of the record", "4")
    model = json.loads(student["model"])
    assert (model["who"], model["steps"], model["timesteps"], model["guidance_scale"]) == (
        "student",
        2,
        [999, 499],
        1,
    )
    model = json.loads(teacher["model"])
    assert (model["who"], model["steps"], model["guidance_scale"]) == ("teacher", 4, 3)


def test_an_image_may_have_another_size_than_records(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = ("sample", "--config", place.config, "--adapter", place.run, "--prompt", 'says "OPEN"')
    result = call(*base, "--box", "80,16,120,40", "--size", "128x64", "--compare", "--out", tmp_path / "wide.png")
    assert result.exit_code == 0, result.output
    assert "128x64 is not the size that the model was trained at, 64x64" in caplog.text
    caplog.clear()
    assert picture(tmp_path / "wide.png").shape == (64, 2 * 128 + 4, 3)
    box = [[80, 16], [120, 16], [120, 40], [80, 40]]
    assert json.loads(said(tmp_path / "wide.png")["lines"])[0]["polygon"] == box
    square = call(*base, "--box", "8,16,56,40", "--size", "64x64", "--out", tmp_path / "square.png")
    assert square.exit_code == 0 and "not the size" not in caplog.text


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

    sample = ("sample", "--config", place.config, "--record", "0", "--shards", place.shards)
    for adapter, name in ((place.run, "run.png"), (out, "export.png")):
        result = call(*sample, "--adapter", adapter, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
    difference = picture(tmp_path / "run.png").astype(int) - picture(tmp_path / "export.png")
    assert np.abs(difference).max() <= 1


def test_a_comparison_shows_layout_teacher_and_student_of_each_record(place: Place, tmp_path: Path) -> None:
    base = ("compare", "--config", place.config, "--shards", place.shards, "--adapter", place.run)
    result = call(*base, "--records", "0,2", "--out", tmp_path / "grid.png")
    assert result.exit_code == 0, result.output
    grid = Image.open(tmp_path / "grid.png")
    tile = 3 * SIDE  # small images are enlarged
    assert grid.width >= 4 * tile and grid.height >= 2 * tile
    shown = np.asarray(grid)[-tile:]
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 100

    # Another student of as many steps is one more column, one of one step three: the teacher is there, too, with
    # guidance and without.
    write_fresh_student(tmp_path / "other", load_config(place.config, ("lora.rank=2",)))
    write_fresh_student(tmp_path / "one", load_config(place.config, ("lora.rank=2",)), steps=1)
    more = ("--adapter", tmp_path / "other", "--adapter", tmp_path / "one", "--records", "0,2")
    assert call(*base, *more, "--out", tmp_path / "more.png").exit_code == 0
    wide = np.asarray(Image.open(tmp_path / "more.png"))
    column = tile + 6
    assert wide.shape[1] == grid.width + 4 * column
    assert np.array_equal(wide[-tile:, : 5 * column], shown[:, : 5 * column])
    # A student that changes nothing is the teacher in as many steps without guidance.
    guided, unguided, student = (wide[-tile:, n * column : n * column + tile].astype(int) for n in (6, 7, 8))
    assert np.abs(unguided - student).max() <= 1 < np.abs(guided - student).max()

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
