"""`pipeline.py evaluate` against the teacher's own solves: with noise of its own, and on a recorded set."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from pipeline import cli
from shards.reading.reader import ShardSet
from stage2_student.evaluation.held_out_set import HeldOutSet
from tests.fresh_student import write_fresh_student
from tests.stage1_teacher.small_teacher import annotation, load, write_annotations, write_prompts, write_teacher

RECORDED = "teacher, 4 steps (as recorded)"
STEPS = ("--teacher", "trailing:4", "--teacher", "trailing:2")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 4 steps, held-out inputs, the set recorded of them, and a student that changes nothing."""
    folder = tmp_path_factory.mktemp("distance")
    config = write_teacher(folder)
    write_annotations(folder / "held_out.json", *map(annotation, range(3)))
    write_prompts(folder / "prompts.jsonl", 4)
    recorded = run(
        *("precompute", "--config", config, "--prompts", folder / "prompts.jsonl", "--out", folder / "set"),
        *("--trajectories", folder / "rollouts", "--set", "precompute.num_rollouts=2"),
    )
    assert recorded.exit_code == 0, recorded.output
    write_fresh_student(folder / "fresh", load(config, "lora.rank=2"))
    return folder


def evaluate(folder: Path, out: Path, *more: str | Path) -> Result:
    judge = "tests.stage2_student.evaluation.test_judges:make_parrot"  # what is read is of no account here
    sets = ("--set", "evaluate.batch_size=2", "--set", f"evaluate.judge={judge}")
    return run("evaluate", "--config", folder / "config.toml", "--out", out, *sets, *more)


def own(folder: Path) -> tuple[str | Path, ...]:
    return ("--annotations", folder / "held_out.json")


def recorded(folder: Path) -> tuple[str | Path, ...]:
    return ("--held-out", folder / "set")


def rows_of(out: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    return {row["label"]: row for row in json.loads((out / "evaluation.json").read_bytes())["runs"]}


def test_every_run_is_measured_and_what_was_not_sampled_has_an_empty_cell(folder: Path, tmp_path: Path) -> None:
    # Without guidance the teacher in 2 steps is what an adapter that changes nothing is.
    student = ("--adapter", f"fresh={folder / 'fresh'}", "--truth", "--set", "precompute.guidance_scale=1")
    result = evaluate(folder, tmp_path, *own(folder), *STEPS, *student)
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path)
    assert rows[RECORDED]["endpoint_error"] == {"value": 0, "low": 0, "high": 0, "count": 3}
    assert rows[RECORDED]["psnr"] is None
    teacher, fresh = rows["teacher, 2 steps (trailing grid)"], rows["fresh, 2 steps"]
    for key in ("endpoint_error", "endpoint_error_inside", "endpoint_error_outside"):
        assert fresh[key]["value"] == pytest.approx(teacher[key]["value"], rel=1e-3)
        assert 0.001 < fresh[key]["low"] <= fresh[key]["value"] <= fresh[key]["high"]
    assert 5 < fresh["psnr"]["value"] < 60
    for label in ("true images", "true images through the VAE"):
        assert rows[label]["endpoint_error"] is None and rows[label]["psnr"] is None
        assert f"{label}  " in result.output
    lines = {line.split("  ")[0]: line for line in result.output.splitlines()}
    assert lines["true images"].split()[2:6] == ["-"] * 4
    differences = json.loads((tmp_path / "evaluation.json").read_bytes())["differences"]
    (of_student,) = (row for row in differences if (row["run"], row["less"]) == ("fresh, 2 steps", RECORDED))
    assert of_student["endpoint_error"]["value"] == pytest.approx(fresh["endpoint_error"]["value"])
    assert of_student["psnr"] is None
    (of_truth,) = (row for row in differences if (row["run"], row["less"]) == ("fresh, 2 steps", "true images"))
    assert of_truth["endpoint_error"] is None and of_truth["sen_acc"] is not None
    assert fresh["way"] == []


def test_the_solve_is_made_once_and_serves_runs_that_come_later(folder: Path, tmp_path: Path) -> None:
    student = ("--no-teacher", "--adapter", f"fresh={folder / 'fresh'}")
    assert evaluate(folder, tmp_path, *own(folder), *student).exit_code == 0
    solves = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "solve").iterdir()}
    assert len(solves) == 3
    result = evaluate(folder, tmp_path, *own(folder), *STEPS)
    assert result.exit_code == 0, result.output
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "solve").iterdir()} == solves
    rows = rows_of(tmp_path)
    assert rows[RECORDED]["endpoint_error"]["value"] < 1e-3 < rows["fresh, 2 steps"]["endpoint_error"]["value"]

    whole = tmp_path / "whole"
    assert evaluate(folder, whole, *own(folder), *STEPS, *student[1:]).exit_code == 0
    same = rows_of(whole)["fresh, 2 steps"]["endpoint_error"]["value"]
    assert rows["fresh, 2 steps"]["endpoint_error"]["value"] == pytest.approx(same, rel=1e-3)


def test_a_set_brings_layouts_noise_and_solves_and_its_trajectories_the_way(folder: Path, tmp_path: Path) -> None:
    result = evaluate(
        folder,
        tmp_path,
        *(*recorded(folder), "--trajectories", folder / "rollouts", *STEPS),
        *("--adapter", f"fresh={folder / 'fresh'}", "--set", "evaluate.samples_per_layout=2"),
    )
    assert result.exit_code == 0, result.output
    assert "8 lines of 4 layouts" in result.output
    rows = rows_of(tmp_path)
    assert rows[RECORDED]["images"] == 8
    assert rows[RECORDED]["endpoint_error"]["value"] < 2e-3  # the same solve again, but for its batches
    assert [row["timestep"] for row in rows[RECORDED]["way"]] == [749, 499, 249, -1]
    teacher, fresh = rows["teacher, 2 steps (trailing grid)"], rows["fresh, 2 steps"]
    for row in (teacher, fresh):
        assert [state["timestep"] for state in row["way"]] == [499, -1]
        assert row["way"][-1]["error"]["value"] == pytest.approx(row["endpoint_error"]["value"], rel=1e-3)
        assert 0 < row["way"][0]["error"]["value"] < row["endpoint_error"]["value"]
    assert not (tmp_path / "solve").exists()

    page = tmp_path / "report.html"
    assert run("report", "--evaluation", tmp_path, "--out", page).exit_code == 0
    assert "<h2>Distance along the way</h2>" in page.read_text()


def test_the_error_on_a_set_is_that_of_latents_worked_out_by_hand(folder: Path, tmp_path: Path) -> None:
    student = ("--no-teacher", "--adapter", f"fresh={folder / 'fresh'}", "--set", "evaluate.num_samples=2")
    assert evaluate(folder, tmp_path, *recorded(folder), *student).exit_code == 0
    found = rows_of(tmp_path)["fresh, 2 steps"]["endpoint_error"]["value"]

    from common.anytext2.conditioning import ConditioningBatch
    from stage2_student.student.sample import LoadedStudent

    records = [ShardSet.open(folder / "set")[index] for index in range(2)]
    loaded = LoadedStudent.load(load(folder / "config.toml"), folder / "fresh")
    noise = torch.stack([record.rollout_latents[0, :1].float() for record in records])
    latents = loaded.latents(ConditioningBatch.stack([record.conditioning for record in records]), noise)
    solved = torch.stack([record.rollout_latents[0, -1].float() for record in records])
    assert found == pytest.approx(math.sqrt(float(((latents - solved) ** 2).mean())), rel=1e-4)


def test_a_sets_layouts_are_what_its_records_ask_for(folder: Path) -> None:
    found = HeldOutSet(str(folder / "set"), 3)
    assert [layout.lines[0].text for layout in found.layouts] == ["P0", "P1", "P2"]
    for number, layout in enumerate(found.layouts):
        assert layout.caption.startswith(f"prompt {number} ") and not layout.caption.endswith("fine")
    assert found.layouts[0].lines[0].in_glyph_map and found.layouts[0].lines[0].color is None
    np.testing.assert_allclose(found.layouts[0].lines[0].polygon[0], (4, 8), atol=1)


def test_the_two_kinds_of_noise_are_never_mixed_in_one_folder(folder: Path, tmp_path: Path) -> None:
    few = ("--teacher", "trailing:2")
    assert evaluate(folder, tmp_path / "own", *own(folder), *few).exit_code == 0
    refused = evaluate(folder, tmp_path / "own", *recorded(folder), *few)
    assert refused.exit_code == 3
    assert "holds runs on layouts and noise of its own, received a question on the recorded set" in refused.output
    assert "give another --out" in refused.output
    assert evaluate(folder, tmp_path / "set", *recorded(folder), *few).exit_code == 0
    refused = evaluate(folder, tmp_path / "set", *own(folder), *few)
    assert refused.exit_code == 3 and "holds runs on the recorded set" in refused.output
    later = evaluate(folder, tmp_path / "set", *recorded(folder), "--trajectories", folder / "rollouts", *few)
    assert later.exit_code == 3 and "held_out.trajectories: received true, expected false" in later.output


def test_a_folder_without_solves_goes_on_without_and_is_not_mixed(folder: Path, tmp_path: Path) -> None:
    without = ("--set", "evaluate.endpoint_error=false")
    assert evaluate(folder, tmp_path, *own(folder), *without, "--teacher", "trailing:2").exit_code == 0
    assert not (tmp_path / "solve").exists()
    refused = evaluate(folder, tmp_path, *own(folder), "--teacher", "trailing:1")
    assert refused.exit_code == 3
    assert "were not measured against the teacher's own solves" in refused.output
    going_on = evaluate(folder, tmp_path, *own(folder), *without, "--teacher", "trailing:1")
    assert going_on.exit_code == 0, going_on.output
    assert "error" not in going_on.output.splitlines()[0]
    assert all(row["endpoint_error"] is None for row in rows_of(tmp_path).values())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "no inputs; give --annotations FILE or --prompts FILE, or --held-out SET"),
        (("--held-out", "SET", "--truth"), 2, "received --truth, which would be ignored"),
        (("--held-out", "SET", "--without", "attnx"), 2, "received --without, which would be ignored"),
        (("--held-out", "SET", "--annotations", "x"), 2, "received --annotations, which would be ignored"),
        (("--held-out", "SET", "--no-teacher"), 2, "nobody samples; give --adapter RUN"),
        (("--held-out", "SET", "--set", "evaluate.samples_per_layout=3"), 2, "expected at most 2, the solves"),
        (("--held-out", "nowhere"), 3, "nowhere"),
        (("--held-out", "SET", "--trajectories", "nowhere"), 3, "nowhere: no trajectories"),
        (("--annotations", "x", "--trajectories", "ROLLOUTS"), 2, "they belong to the set of --held-out"),
    ],
)
def test_what_does_not_go_with_a_set_is_refused(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    known = {"SET": folder / "set", "ROLLOUTS": folder / "rollouts"}
    result = evaluate(folder, tmp_path / "out", *(known.get(word, word) for word in arguments))
    assert result.exit_code == code, result.output
    assert message in result.output


def test_sets_and_trajectories_of_another_teacher_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = write_teacher(tmp_path / "other", seed="1")
    made = ("precompute", "--config", other, "--prompts", folder / "prompts.jsonl", "--limit", "2")
    place = ("--out", tmp_path / "set", "--trajectories", tmp_path / "rollouts")
    assert run(*made, *place).exit_code == 0
    wrong = evaluate(folder, tmp_path / "out", "--held-out", tmp_path / "set")
    assert wrong.exit_code == 3 and "the shards were recorded on the base" in wrong.output
    wrong = evaluate(folder, tmp_path / "out", *recorded(folder), "--trajectories", tmp_path / "rollouts")
    assert wrong.exit_code == 3 and "the trajectories are not of this set" in wrong.output
