from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from common.errors import DataError
from pipeline import cli
from stage2_student.report.data import embed_image, gather
from stage2_student.report.page import render
from tests.stage2_student.report import crowded as crowded_page
from tests.stage2_student.report.conftest import HOSTILE, RUNS


@pytest.fixture(scope="module")
def page(evaluation: Path, training: Path) -> str:
    return render(gather(evaluation, [training]), "A title & more", Path("report.html"))


def test_the_page_needs_nothing_else(page: str) -> None:
    addresses = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')>\s]+)', page)
    assert addresses
    assert all(address.startswith("data:image/") for address in addresses)
    assert "<script" not in page
    assert "@import" not in page


def test_every_section_is_there(page: str) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Distance to the teacher's own solve",
        "Accuracy against steps",
        "All runs",
        "The same noise, sampled by each run",
        "Distance along the way",
        "By height of the text",
        "Paired differences",
        "Training",
        "Settings",
        "How to make it again",
    ]
    assert page.count("<img ") == 5 * len(RUNS)
    assert page.count('class="chart"') == 12  # four charts, each for a wide, a middling and a narrow screen


def test_lines_out_of_the_glyph_map_have_a_section_where_there_are_any(page: str, crowded: Path) -> None:
    heading = "<h2>In and out of the glyph map</h2>"
    assert heading not in page
    assert heading in render(gather(crowded, []), "A title", Path("report.html"))


def test_what_others_wrote_is_shown_and_not_run(page: str) -> None:
    assert HOSTILE not in page
    assert '&lt;script&gt;alert("&amp;")&lt;/script&gt;' in page
    assert "<title>A title &amp; more</title>" in page


def test_hostile_labels_and_texts_are_escaped_wherever_they_stand(crowded: Path, trainings: list[Path]) -> None:
    page = render(gather(crowded, trainings), f"{crowded_page.HOSTILE} title", Path(crowded_page.HOSTILE))
    assert "<script" not in page
    assert "<b>" not in re.sub(r"<b>[+−\d.]+(?:\u00a0%)?</b>", "", page)  # only numbers are bold
    assert page.count("&lt;script&gt;alert(") > 20
    assert 'alt="sampled by &lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; ' in page


def test_the_figures_are_those_of_the_evaluation(page: str, evaluation: Path) -> None:
    runs = {run.label: run.sen_acc for run in gather(evaluation).summary.runs}
    best = runs["run-a, 4 steps"].value
    assert f"<strong>{100 * best:.1f}\u00a0%</strong><span>run-a, 4 steps</span>" in page
    assert "<strong>10.0 ×</strong><span>faster: 4 UNet calls instead of 40</span>" in page
    # As many UNet calls as steps; run-a's squares are of the same size as the teacher's in as many steps.
    assert "<strong>1.0 ×</strong><span>nearer to the teacher's own solve: run-a, 4 steps" in page
    assert "teacher, 40 steps (as recorded): what it learnt from" in page
    assert "ceiling" not in page
    worst = runs["teacher, 4 steps (trailing grid)"].value
    assert worst < best


def test_wrong_readings_are_marked(page: str) -> None:
    assert 'class="reading right"' in page
    assert 'class="reading wrong' in page


def test_without_training_runs_and_examples_their_sections_are_left_out(evaluation: Path) -> None:
    page = render(gather(evaluation, num_examples=0), "title", Path("report.html"))
    assert "<h2>Training</h2>" not in page
    assert "<img" not in page


def test_the_command_writes_the_page(evaluation: Path, training: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    arguments = ["report", "--evaluation", str(evaluation), "--run", str(training), "--out", str(out)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert out.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("option", ["--evaluation", "--run"])
def test_a_folder_that_is_neither_is_one_line_and_exit_code_3(
    evaluation: Path, training: Path, tmp_path: Path, option: str
) -> None:
    folders = {"--evaluation": evaluation, "--run": training, option: tmp_path}
    arguments = [part for name, folder in folders.items() for part in (name, str(folder))]
    result = CliRunner().invoke(cli, ["report", *arguments, "--out", str(tmp_path / "report.html")])
    assert result.exit_code == 3
    assert str(tmp_path) in result.output
    assert not (tmp_path / "report.html").exists()


def test_large_images_are_scaled_down_and_broken_ones_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1024, 512, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert embed_image(tmp_path / "large.png").startswith("data:image/jpeg;base64,")
    assert len(embed_image(tmp_path / "large.png")) < 100_000
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="broken.png"):
        embed_image(tmp_path / "broken.png")
