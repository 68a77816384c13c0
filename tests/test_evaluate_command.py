"""`pipeline.py evaluate` end to end, on a teacher small enough for tests: it samples noise, which is enough."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from pipeline import cli
from stage1_teacher.measuring.ablations import ABLATIONS
from tests.fresh_student import write_fresh_student
from tests.stage1_teacher.small_teacher import annotation, load, write_annotations, write_teacher
from tests.stage2_student.evaluation.drawn_text import draw_layouts


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, three held-out inputs and a student whose adapter changes nothing."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = load(write_teacher(folder), "lora.rank=2")
    write_annotations(folder / "held_out.json", *map(annotation, range(3)))
    write_fresh_student(folder / "fresh", config)
    return folder


def evaluate(folder: Path, out: Path, *more: str | Path) -> Result:
    return run(
        "evaluate",
        *("--config", folder / "config.toml", "--annotations", folder / "held_out.json", "--out", out),
        *("--set", "precompute.solver_steps=8", "--set", "evaluate.batch_size=2", *more),
    )


def summary_of(out: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    summary = json.loads((out / "evaluation.json").read_bytes())
    return {row["label"]: row for row in summary["runs"]}


def pictures(out: Path, name: str) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((out / "runs" / name / "images").iterdir())])


def test_teacher_and_student_draw_from_the_same_noise_and_their_costs_are_counted(
    folder: Path, tmp_path: Path
) -> None:
    exported = folder / "student.safetensors"
    made = run("export", "--adapter", folder / "fresh", "--format", "kohya", "--out", exported)
    assert made.exit_code == 0, made.output
    result = evaluate(
        folder,
        tmp_path,
        *("--adapter", f"untrained={folder / 'fresh'}", "--adapter", f"exported={exported}"),
        *("--teacher", "trailing:2", "--teacher", "upstream:3", "--set", "precompute.guidance_scale=1"),
    )
    assert result.exit_code == 0, result.output
    assert "teacher, 2 steps (trailing grid)" in result.output
    rows = summary_of(tmp_path)
    assert list(rows) == [
        "teacher, 3 steps (upstream grid)",
        "teacher, 2 steps (trailing grid)",
        "exported, 2 steps",
        "untrained, 2 steps",
    ]
    assert [rows[label]["unet_evaluations"] for label in rows] == [3, 2, 2, 2]
    assert [rows[label]["writenet_evaluations"] for label in rows] == [1, 1, 1, 1]
    assert all(row["seconds_per_image"] > 0 and row["images"] == 3 for row in rows.values())
    # An adapter that changes nothing, without guidance, is the teacher: a difference would be the measurement's.
    ours, theirs = pictures(tmp_path, "untrained-2-steps"), pictures(tmp_path, "teacher-2-steps-trailing-grid")
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.array_equal(ours, pictures(tmp_path, "exported-2-steps"))
    other = pictures(tmp_path, "teacher-3-steps-upstream-grid")
    assert np.abs(other.astype(int) - theirs).max() > 5


def test_a_guided_solve_costs_two_evaluations_a_step_and_runs_join_a_folder(folder: Path, tmp_path: Path) -> None:
    assert evaluate(folder, tmp_path, "--teacher", "trailing:8", "--truth").exit_code == 0
    before = (tmp_path / "runs/teacher-8-steps-as-recorded/results.jsonl").read_bytes()
    result = evaluate(folder, tmp_path, "--no-teacher", "--without", "writenet", "--without", "caption")
    assert result.exit_code == 0, result.output
    rows = summary_of(tmp_path)
    assert list(rows) == [
        "true images",
        "true images through the VAE",
        "teacher, 20 steps (upstream grid)",
        "teacher, 8 steps (as recorded)",
        "teacher, 20 steps (upstream grid) without caption",
        "teacher, 20 steps (upstream grid) without writenet",
    ]
    assert rows["teacher, 8 steps (as recorded)"]["unet_evaluations"] == 16
    assert rows["teacher, 8 steps (as recorded)"]["writenet_evaluations"] == 2
    assert rows["teacher, 20 steps (upstream grid) without writenet"]["writenet_evaluations"] == 0
    assert (tmp_path / "runs/teacher-8-steps-as-recorded/results.jsonl").read_bytes() == before
    assert len((tmp_path / "invocations.jsonl").read_text().splitlines()) == 2


def test_without_brings_the_whole_teacher_and_every_part_left_out_changes_the_images(
    folder: Path, tmp_path: Path
) -> None:
    parts = (*sorted(ABLATIONS), "attnx+writenet", "glyph-embedding+glyph-map")
    line = {"polygon": [[60, 75], [436, 75], [436, 165], [60, 165]], "text": "OPEN", "color": [200, 30, 30]}
    write_annotations(tmp_path / "a.json", annotation(0, annotations=[line]))
    result = run(
        *("evaluate", "--config", folder / "config.toml", "--annotations", tmp_path / "a.json"),
        *("--no-teacher", "--set", "inputs.edit_fraction=0", "--out", tmp_path / "out"),
        *("--set", "precompute.guidance_scale=50"),  # made-up weights hardly hear what they are told
        *(word for part in parts for word in ("--without", part)),
    )
    assert result.exit_code == 0, result.output
    whole = "teacher, 20 steps (upstream grid)"
    rows = summary_of(tmp_path / "out")
    names = sorted(part.replace("-", " ").replace("+", " and ") for part in parts)
    assert list(rows) == [whole, *(f"{whole} without {name}" for name in names)]
    images = {name: pictures(tmp_path / "out", row["folder"]).astype(int) for name, row in rows.items()}
    # The glyph embedding alone changes less than these images resolve: test_held_out looks at the latents.
    audible = [name for name in images if "glyph embedding" not in name]
    for one, other in itertools.combinations(audible, 2):
        assert np.abs(images[one] - images[other]).max() > 1, (one, other)


def test_the_ground_is_compared_with_the_true_image_where_the_caption_alone_tells_it(
    folder: Path, tmp_path: Path
) -> None:
    for share, compared in (("0", 3), ("1", 0)):
        out = tmp_path / share
        more = ("--truth", "--teacher", "trailing:2", "--set", f"inputs.edit_fraction={share}")
        result = evaluate(folder, out, *more)
        assert result.exit_code == 0, result.output
        rows = summary_of(out)
        if compared == 0:
            assert rows["true images"]["ground"] is None
            continue
        assert rows["true images"]["ground"]["value"] == 0
        assert rows["teacher, 2 steps (trailing grid)"]["ground"]["value"] > 5
        assert rows["teacher, 2 steps (trailing grid)"]["ground"]["count"] == compared
        (difference,) = (
            row
            for row in json.loads((out / "evaluation.json").read_bytes())["differences"]
            if row["run"].startswith("teacher") and row["less"] == "true images"
        )
        assert difference["ground"]["low"] > 0
        assert difference["color_acc"] is None


def test_an_images_cost_does_not_depend_on_how_many_are_drawn_of_its_layout(folder: Path, tmp_path: Path) -> None:
    more = ("--teacher", "trailing:2", "--set", "evaluate.samples_per_layout=2")
    assert evaluate(folder, tmp_path, *more).exit_code == 0
    (row,) = summary_of(tmp_path).values()
    assert (row["images"], row["unet_evaluations"], row["writenet_evaluations"]) == (6, 4, 2)


def test_another_seed_is_refused_in_the_same_folder(folder: Path, tmp_path: Path) -> None:
    assert evaluate(folder, tmp_path, "--teacher", "trailing:2").exit_code == 0
    result = evaluate(folder, tmp_path, "--teacher", "trailing:3", "--set", "evaluate.seed=7")
    assert result.exit_code == 3
    assert "what is evaluated differs (settings" in result.output


def test_the_benchmarks_annotations_score_a_folder_of_its_images(tmp_path: Path) -> None:
    images, layouts = draw_layouts("benchmark", 4, 512, (40, 60))
    entries = []
    for image, layout in zip(images, layouts, strict=True):
        for sample in range(4):
            shown = np.full_like(image, 99) if sample == 3 else image
            Image.fromarray(shown).save(tmp_path / f"{layout.name}_{sample}.jpg", quality=95)
        polygon = [[round(x), round(y)] for x, y in layout.lines[0].polygon]
        line = {"polygon": polygon, "text": layout.lines[0].text, "language": "Latin", "valid": True, "pos": 4}
        entries.append({"img_name": f"{layout.name}.jpg", "caption": "a sign", "annotations": [line]})
    # data_root is a folder of another machine, as in the published file.
    content = {"data_root": "/data/vdb/yuxiang.tyx/AIGC/data/laion_word/imgs", "data_list": entries}
    (tmp_path / "test1k.json").write_text(json.dumps(content))
    result = run(
        *("evaluate", "--images", tmp_path, "--annotations", tmp_path / "test1k.json", "--out", tmp_path / "out")
    )
    assert result.exit_code == 0, result.output
    (row,) = summary_of(tmp_path / "out").values()
    assert row["images"] == 16
    assert row["sen_acc"]["value"] == pytest.approx(0.75)


def write_signs(folder: Path, side: int, *names: str) -> None:
    """Images of `side` under their names in imgs/, and data.json with their polygons in their pixels."""
    images, layouts = draw_layouts("signs", len(names), side, (side // 10, side // 8))
    entries = []
    for name, image, layout in zip(names, images, layouts, strict=True):
        (folder / "imgs" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "imgs" / name)
        line = {"polygon": [list(corner) for corner in layout.lines[0].polygon], "text": layout.lines[0].text}
        entries.append({"img_name": name, "caption": name, "annotations": [line]})
    (folder / "data.json").write_text(json.dumps({"data_root": "imgs", "data_list": entries}))


def score(folder: Path, images: Path, *more: str) -> Result:
    place = ("--annotations", folder / "data.json", "--out", folder / f"out{len(list(folder.iterdir()))}")
    return run("evaluate", "--images", images, *place, "--set", "evaluate.keep_images=0", *more)


def test_scored_images_have_the_polygons_of_the_annotated_images_own_pixels(tmp_path: Path) -> None:
    write_signs(tmp_path, 800, "one.png", "two.png")
    (tmp_path / "theirs").mkdir()
    for name in ("one", "two"):  # drawn at another size
        Image.open(tmp_path / "imgs" / f"{name}.png").resize((512, 512)).save(tmp_path / f"theirs/{name}_0.png")
    result = score(tmp_path, tmp_path / "theirs")
    assert result.exit_code == 0, result.output
    assert "2 lines of 2 layouts" in result.output and "images are not there" not in result.output
    values = [json.loads(path.read_bytes()) for path in tmp_path.glob("out*/evaluation.json")]
    assert [row["sen_acc"]["value"] for value in values for row in value["runs"]] == [1]
    (tmp_path / "imgs").rename(tmp_path / "gone")
    result = score(tmp_path, tmp_path / "theirs")
    assert (result.exit_code, "expected at most 512" in result.output) == (2, True), result.output
    assert "--set inputs.frame=SIDE" in result.output
    result = score(tmp_path, tmp_path / "theirs", "--set", "inputs.frame=800")
    assert result.exit_code == 0 and "1.000" in result.output, result.output


def test_images_are_told_apart_by_their_whole_names(tmp_path: Path) -> None:
    write_signs(tmp_path, 512, "menu.1.png", "menu.2.png", "day1/001.png", "day2/001.png")
    theirs = tmp_path / "theirs"
    for name in ("menu.1", "menu.2", "day1/001", "day2/001"):
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "imgs" / f"{name}.png", theirs / f"{name}_0.png")
    shutil.copy(theirs / "menu.1_0.png", theirs / "menu_0.png")
    result = score(tmp_path, theirs)
    assert result.exit_code == 0, result.output
    (evaluation,) = tmp_path.glob("out*/evaluation.json")
    assert json.loads(evaluation.read_bytes())["runs"][0]["sen_acc"]["value"] == 1
    for name in ("menu.1", "menu.2"):
        (theirs / f"{name}_0.png").unlink()
    result = score(tmp_path, theirs)
    assert result.exit_code == 3
    assert "'menu.1.png' and 'menu.2.png' would both be scored by menu_0" in result.output


def test_fonts_of_scored_images_lie_beside_their_configuration(tmp_path: Path) -> None:
    images, layouts = draw_layouts("benchmark", 1, 96, (16, 20))
    shutil.copy("models/fonts/DejaVuSans.ttf", tmp_path / "mine.ttf")
    (tmp_path / "config.toml").write_text('[inputs.fonts]\nmine = "mine.ttf"\n')
    (tmp_path / "theirs").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "theirs" / f"{layouts[0].name}_0.png")
    polygon = [list(corner) for corner in layouts[0].lines[0].polygon]
    line = {"polygon": polygon, "text": layouts[0].lines[0].text, "font": "mine"}
    entries = [{"img_name": f"{layouts[0].name}.jpg", "caption": "a sign", "annotations": [line]}]
    (tmp_path / "elsewhere").mkdir()
    annotations = tmp_path / "elsewhere" / "data.json"
    annotations.write_text(json.dumps({"data_root": "imgs", "data_list": entries}))
    command = ("evaluate", "--config", tmp_path / "config.toml", "--images", tmp_path / "theirs")
    result = run(*command, "--annotations", annotations, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--teacher", "leading:4"), 2, "grid 'leading:4': expected trailing:STEPS or upstream:STEPS"),
        (
            ("--without", "eyes"),
            2,
            "--without eyes: received 'eyes', expected one of attnx, caption, color, glyph-emb",
        ),
        (("--without", ""), 2, "--without: received nothing, expected one of attnx, caption"),
        (("--adapter", "nowhere"), 3, "nowhere: no adapter there"),
        (("--set", "evaluate.judge=tesseract"), 2, "received 'tesseract'"),
        (("--set", "evaluate.batch_size=0"), 2, "evaluate.batch_size: received 0, expected at least 1"),
        (("--no-teacher", "--teacher", "trailing:4"), 2, "received --teacher with --no-teacher"),
        (("--images", "nowhere"), 3, "nowhere: no such folder"),
        (("--set", "evaluate.fid_weights=nowhere.pt"), 3, "config evaluate.fid_weights: no file or folder"),
        (("--set", "evaluate.fid_weights=README.md"), 2, "FID compares with the true images; add --truth"),
        (("--images", ".", "--truth"), 2, "received --truth too"),
        (("--images", ".", "--adapter", "x", "--without", "attnx"), 2, "received --adapter, --without too"),
        (("--images", ".", "--teacher", "trailing:4"), 2, "received --teacher too"),
        (("--images", ".", "--no-teacher"), 2, "received --no-teacher too"),
        (("--images", ".", "--set", "evaluate.fid_weights=README.md"), 2, "received no evaluate.fid_reference"),
    ],
)
def test_a_mistake_is_one_line_and_the_documented_exit_code(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = evaluate(folder, tmp_path / "out", *arguments)
    assert result.exit_code == code, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_inputs_that_cannot_be_used_are_left_out_and_none_left_is_an_error(folder: Path, tmp_path: Path) -> None:
    broken = annotation(0, img_name="missing.png")
    write_annotations(tmp_path / "some.json", broken, annotation(1))
    result = evaluate(folder, tmp_path / "out", "--annotations", tmp_path / "some.json", "--teacher", "trailing:1")
    assert result.exit_code == 0, result.output
    write_annotations(tmp_path / "none.json", broken)
    result = run(
        *("evaluate", "--config", folder / "config.toml", "--annotations", tmp_path / "none.json"),
        *("--out", tmp_path / "other"),
    )
    assert result.exit_code == 3
    assert "none of 1 inputs can be used" in result.output
