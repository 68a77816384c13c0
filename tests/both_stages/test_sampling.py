from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from both_stages.sampling import ImageSampler, Prompt, RecordOf, TextLine
from common.config import PROJECT_ROOT, Config
from common.errors import DataError, UsageError
from common.pictures import write_png
from pipeline import cli
from tests.fresh_student import write_fresh_student
from tests.stage1_teacher.small_teacher import load, write_prompts, write_teacher

PROMPT = Prompt(text='a sign that says "OPEN"', boxes=[(8, 16, 56, 40)], colors=["#d01818"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name: configs/tiny.toml, demo/shards and demo/run, as small as can be."""
    folder = tmp_path_factory.mktemp("sampling")
    torch.set_num_threads(1)
    (folder / "configs").mkdir()
    path = write_teacher(folder / "configs").rename(folder / "configs" / "tiny.toml")
    command = [
        "--config",
        path,
        "--prompts",
        write_prompts(folder / "p.jsonl", 2),
        "--out",
        folder / "demo/shards",
    ]
    result = CliRunner().invoke(cli, ["precompute", *map(str, command), "--set", "precompute.num_rollouts=2"])
    assert result.exit_code == 0, result.output
    write_fresh_student(folder / "demo" / "run", load(path, "lora.rank=2"))
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return load(folder / "configs" / "tiny.toml")


@pytest.fixture(scope="module")
def student(folder: Path, config: Config) -> ImageSampler:
    return ImageSampler(config, adapter=folder / "demo" / "run")


@pytest.fixture(scope="module")
def teacher(config: Config) -> ImageSampler:
    return ImageSampler(config)


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(folder)
    yield folder


def test_the_documented_example_runs(in_folder: Path) -> None:
    text = ImageSampler.__doc__ or ""
    example = doctest.DocTestParser().get_doctest(text, {}, "ImageSampler", None, None)
    results = doctest.DocTestRunner().run(example)
    assert results.attempted > 5 and results.failed == 0


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_an_example_of_the_documentation_runs(
    in_folder: Path, page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (PROJECT_ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "both_stages" in block)
    (in_folder / "open.png").unlink(missing_ok=True)
    exec(example, {})
    assert (in_folder / "open.png").stat().st_size > 100
    if page == "docs/python.md":
        assert "2 UNet calls an image at t = (999, 499)" in capsys.readouterr().out


def test_boxes_may_be_numbers_or_as_typed(student: ImageSampler) -> None:
    typed = Prompt(text=PROMPT.text, boxes=["8,16,56,40"], colors=PROMPT.colors)
    assert torch.equal(student.sample(PROMPT).latents, student.sample(typed).latents)


def test_lines_say_what_a_sentence_says(student: ImageSampler) -> None:
    line = TextLine(text="OPEN", box=(8, 16, 56, 40), color="#d01818")
    lines = Prompt(text=PROMPT.text, lines=[line])
    assert torch.equal(student.sample(PROMPT).latents, student.sample(lines).latents)
    corners = Prompt(
        text=PROMPT.text, lines=[TextLine(text="OPEN", polygon=[(8, 16), (56, 16), (56, 40), (8, 40)])]
    )
    assert torch.equal(student.encode(corners).positions, student.encode(PROMPT).positions)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (Prompt(text="a", lines=[TextLine(text="A", box=(0, 0, 9, 9))], boxes=["1,1,5,5"]), "received both"),
        (Prompt(text="a", lines=[TextLine(text="A")]), "either a box or a polygon"),
        (Prompt(text="a", lines=[TextLine(text=" ", box=(0, 0, 9, 9))]), "text is empty"),
        (Prompt(text="a", lines=[TextLine(text="A", box=(9, 0, 0, 9))]), "is empty; expected x0 < x1"),
        (Prompt(text="a", lines=[TextLine(text="A", box=(0, 0, 9, 9), color="red")]), "expected .* or"),
        (
            Prompt(text="a", lines=[TextLine(text="A", box=(0, 0, 9, 9), font="none.ttf")]),
            "is no file and no font",
        ),
        (Prompt(text="a", lines=[TextLine(text="A", box=(0, 0, 9, 9))], image=Path("none.png")), "none.png"),
    ],
)
def test_lines_that_are_wrong_are_refused(student: ImageSampler, prompt: Prompt, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        student.sample(prompt)


def test_a_batch_holds_what_each_prompt_gives_alone(student: ImageSampler, teacher: ImageSampler) -> None:
    long = Prompt(text="a wall " * 60, lines=[TextLine(text="24H", box=(4, 4, 60, 30))])  # two chunks of 77
    for sampler, calls in ((student, 2), (teacher, 8)):
        batch = sampler.sample_batch([PROMPT, long], seeds=[3, 4])
        assert batch.unet_calls == calls  # the teacher's 4 steps have two branches
        assert [texts["seed"] for texts in batch.texts] == ["3", "4"]
        for row, (prompt, seed) in enumerate(((PROMPT, 3), (long, 4))):
            alone = sampler.sample(prompt, seed=seed).latents[0]
            torch.testing.assert_close(batch.latents[row], alone, atol=1e-4, rtol=1e-4)
    compared = student.sample_batch([PROMPT, long], seeds=3, compare=True)
    assert compared.teacher is not None
    apart = np.abs(compared.teacher[0].astype(int) - teacher.sample(PROMPT, seed=3).pictures[0])
    assert apart.max() <= 2  # rounding of a batch of another size
    with pytest.raises(UsageError, match="a seed for each prompt"):
        student.sample_batch([PROMPT], seeds=[1, 2])


def test_editing_depends_on_the_image_outside_the_boxes(student: ImageSampler, tmp_path: Path) -> None:
    encoded = []
    for shade in (20, 200):
        write_png(tmp_path / f"{shade}.png", np.full((64, 64, 3), shade, np.uint8))
        prompt = Prompt(text="a", lines=[TextLine(text="A", box=(8, 8, 40, 30))], image=tmp_path / f"{shade}.png")
        encoded.append(student.encode(prompt).masked_latents)
    assert float((encoded[0] - encoded[1]).abs().max()) > 1e-3


def test_samplers_share_the_encoders(config: Config, folder: Path, teacher: ImageSampler) -> None:
    beside = ImageSampler(config, adapter=folder / "demo" / "run", encoders_of=teacher)
    assert torch.equal(beside.encode(PROMPT).text_context, teacher.encode(PROMPT).text_context)
    assert beside.teacher is teacher.teacher


def test_sampling_is_timed_and_can_be_stopped_between_calls(student: ImageSampler) -> None:
    calls: list[int] = []

    def stop() -> None:
        calls.append(len(calls))
        if len(calls) == 2:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        student.sample(PROMPT, before_call=stop)
    samples = student.sample(PROMPT)  # nothing is left of it
    assert len(calls) == 2
    assert 0 < samples.seconds < 60 and 0 < samples.encode_seconds < 60


def test_an_image_depends_on_its_seed_and_number_alone(student: ImageSampler) -> None:
    three = student.sample(PROMPT, seed=3, num_images=3)
    assert three.latents.shape[0] == len(three.pictures) == 3
    assert all(picture.shape == (64, 64, 3) and picture.dtype == np.uint8 for picture in three.pictures)
    torch.testing.assert_close(student.sample(PROMPT, seed=3).latents[0], three.latents[0], atol=1e-4, rtol=1e-4)
    other = student.sample(PROMPT, seed=4).latents[0]
    for latents in (*three.latents[1:], other):
        assert float((latents - three.latents[0]).abs().max()) > 0.1


def test_the_teacher_beside_a_student_is_the_teacher_alone(student: ImageSampler, teacher: ImageSampler) -> None:
    both, alone = student.sample(PROMPT, seed=5, compare=True), teacher.sample(PROMPT, seed=5)
    assert both.teacher is not None and alone.teacher is None
    assert np.array_equal(both.teacher[0], alone.pictures[0])
    assert not np.array_equal(both.pictures[0], alone.pictures[0])


def test_a_record_is_sampled_from_the_noise_that_the_teacher_had(
    folder: Path, student: ImageSampler, teacher: ImageSampler
) -> None:
    record = RecordOf(shards=str(folder / "demo" / "shards"), index=1)
    both, alone = student.sample(record, num_images=2, compare=True), teacher.sample(record, num_images=2)
    assert both.teacher is not None
    for recorded, solved in zip(both.teacher, alone.pictures, strict=True):
        assert np.abs(recorded.astype(int) - solved).max() <= 8  # the record rounded its states to float16
    with pytest.raises(UsageError, match="leave --seed out"):
        student.sample(record, seed=1, compare=True)
    with pytest.raises(UsageError, match="holds records 0 to 1"):
        student.sample(RecordOf(shards=record.shards, index=-1))


def test_a_teacher_is_not_compared_with_itself(teacher: ImageSampler) -> None:
    with pytest.raises(UsageError, match="--compare goes with --adapter"):
        teacher.sample(PROMPT, compare=True)


def test_a_student_samples_a_record_without_the_teachers_code(folder: Path) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from both_stages.sampling import ImageSampler, RecordOf\n"
        "from common.config import load_config\n"
        "student = ImageSampler(load_config(Path('configs/tiny.toml')), adapter=Path('demo/run'))\n"
        "student.sample(RecordOf(shards='demo/shards', index=0), compare=True)\n"
        "sys.exit(str([name for name in sys.modules if name.startswith('stage1_teacher')] or '') or None)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_what_will_hardly_be_seen_is_said_and_sampled_all_the_same(
    teacher: ImageSampler, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = Prompt(text='"OPEN" above "TAXI"', boxes=[(8, 8, 56, 40), (8, 30, 70, 60)])
    assert len(teacher.sample(prompt).pictures) == 1
    cut, overlap = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert cut.startswith("prompt: the box of 'TAXI' is cut by the edge of the image of 64 x 64 pixels")
    assert overlap.startswith("prompt: the boxes of 'OPEN' and 'TAXI' overlap by 480 pixels")
    with pytest.raises(DataError, match=r"font DejaVuSans\.ttf lacks 咖 \(U\+5496\)"):
        teacher.sample(Prompt(text='"咖啡"', boxes=[(8, 8, 56, 40)]))
