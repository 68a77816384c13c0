from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from common.errors import DataError
from common.layouts import Layout
from pipeline import cli
from stage2_student.evaluation.invocation import INVOCATIONS_FILE
from stage2_student.evaluation.results import (
    RESULTS_FILE,
    RUN_FILE,
    ImageResult,
    check_or_create,
    open_results,
    save_layouts,
)
from stage2_student.report import data as report_data
from stage2_student.report.data import gather
from stage2_student.report.page import render
from tests.stage2_student.report.crowded import LONG_NAME


def evaluate_three_samples(folder: Path) -> Path:
    """Write an evaluation that kept every image, three of each of four layouts."""
    layouts = [Layout(layout_id=f"l{i}", size=(8, 8), lines=(), name="") for i in range(4)]
    save_layouts(folder, layouts, {"samples_per_layout": 3, "judge": "r", "seed": 0})
    place = folder / "runs" / "a"
    check_or_create(place / RUN_FILE, {"label": "a", "kind": "images", "steps": 0, "settings": {}}, "a")
    (place / "images").mkdir()
    results = []
    for layout in layouts:
        for sample in (2, 0, 1):
            name = f"{layout.layout_id}_{sample}.png"
            Image.new("RGB", (8, 8)).save(place / "images" / name)
            costs = {"seconds": 0.0, "unet_evaluations": 0.0, "writenet_evaluations": 0.0}
            results.append(ImageResult(layout_id=layout.layout_id, sample=sample, lines=(), image=name, **costs))
    with open_results(place / RESULTS_FILE) as writer:
        writer.append(*results)
    return folder


def test_only_the_first_image_of_each_shown_layout_is_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = []
    monkeypatch.setattr(report_data, "embed_image", lambda path: embedded.append(path.name) or "data:image/png,")
    found = gather(evaluate_three_samples(tmp_path), num_examples=2)
    assert embedded == ["l0_0.png", "l1_0.png"]
    assert [len(examples) for _, examples in found.examples] == [1, 1]


def test_a_torn_line_among_the_commands_is_left_out(crowded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(crowded, tmp_path / "evaluation"))
    with (folder / INVOCATIONS_FILE).open("ab") as file:
        file.write(b'{"command":"pipeline.py eval')
    assert len(gather(folder, num_examples=0).invocations) == 1
    (folder / INVOCATIONS_FILE).write_bytes(b"{")
    page = render(gather(folder, num_examples=0), "title", tmp_path / "report.html")
    assert "Measured" not in page
    assert "# how it was evaluated is not known" in page


@pytest.mark.parametrize("content", [b'{"train":', b"[]", b"\xff"])
def test_a_damaged_configuration_is_one_line(
    crowded: Path, trainings: list[Path], tmp_path: Path, content: bytes
) -> None:
    run = Path(shutil.copytree(trainings[0], tmp_path / "run"))
    (run / "config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"config.json: .*expected a JSON object; restore it"):
        gather(crowded, [run])
    arguments = ["--evaluation", str(crowded), "--run", str(run), "--out", str(tmp_path / "report.html")]
    result = CliRunner().invoke(cli, ["report", *arguments])
    assert result.exit_code == 3
    assert result.output.count("\n") == 1


def test_the_lead_names_every_machine_and_the_first_and_last_day(crowded: Path, tmp_path: Path) -> None:
    found = gather(crowded, num_examples=0)
    line = {"command": "x", "packages": {}}
    invocations = (
        {**line, "machine": "A, 2 cores", "time": "2026-03-04T10:00:00+00:00"},
        {**line, "machine": "B, 8 cores", "time": "2026-02-28T23:00:00+00:00"},
        {**line, "machine": "A, 2 cores", "time": "2026-03-02T10:00:00+00:00"},
    )
    page = render(dataclasses.replace(found, invocations=invocations), "title", tmp_path / "report.html")
    assert "Measured 2026-02-28 to 2026-03-04 on A, 2 cores, and on B, 8 cores." in page
    page = render(dataclasses.replace(found, invocations=invocations[:1]), "title", tmp_path / "report.html")
    assert "Measured 2026-03-04 on A, 2 cores." in page


def test_runs_that_are_not_complete_are_named_above_the_table(crowded: Path, evaluation: Path) -> None:
    page = render(gather(crowded, num_examples=0), "title", Path("report.html"))
    text = "Not complete, left out: stopped, 4 steps. Run evaluate again to go on."
    assert page.count(text) == 1 and page.index(text) < page.index("<table>")
    assert "Not complete" not in render(gather(evaluation, num_examples=0), "title", Path("report.html"))


def test_the_crowded_evaluation_is_as_trying_as_meant(crowded: Path, trainings: list[Path]) -> None:
    found = gather(crowded, trainings, 3)
    assert len(found.summary.runs) == 17
    assert sum(run.is_ablation for run in found.summary.runs) == 5
    assert len(LONG_NAME) >= 60
    students = [run for run in found.summary.runs if run.kind == "student"]
    best = max(students, key=lambda run: run.sen_acc.value)
    assert best.label.startswith(LONG_NAME)  # the long name is in a tile
    assert max(len(line.text) for layout, _ in found.examples for line in layout.lines) == 20
    assert json.loads((trainings[0] / "shards.json").read_bytes())["location"].endswith("my shards")
