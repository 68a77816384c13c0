"""What `make figures` writes of the demo into README and docs/results.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.demo_figures import BEGIN, END, for_readme, for_results, put
from common.config import PROJECT_ROOT
from stage2_student.evaluation.metrics import Estimate
from stage2_student.evaluation.table import RunRow
from tests.stage2_student.report.rows import run_row, summary_of


def run(
    label: str, kind: str, steps: int, error: float, calls: int, seconds: float, guidance: float = 3
) -> RunRow:
    found = Estimate(value=error, low=error / 2, high=error * 2, count=9)
    shares = {"endpoint_error": found, "sen_acc": found, "unet_evaluations": calls, "seconds_per_image": seconds}
    return run_row(label, kind, steps=steps, settings={"guidance_scale": guidance}, **shares)


RUNS = (
    run_row("true images", "truth", unet_evaluations=0, seconds_per_image=0),
    run("teacher, 40 steps (as recorded)", "teacher", 40, 0.0, 80, 0.5),
    run("teacher, 4 steps (trailing grid)", "teacher", 4, 0.2, 8, 0.05),
    run("teacher, 4 steps (trailing grid, no guidance)", "teacher", 4, 0.15, 4, 0.03, guidance=1),
    run("teacher, 1 step (trailing grid)", "teacher", 1, 2.0, 2, 0.02),
    run("teacher, 1 step (trailing grid, no guidance)", "teacher", 1, 0.4, 1, 0.01, guidance=1),
    run("student, 4 steps", "student", 4, 0.1, 4, 0.03),
    run("student, 1 step", "student", 1, 0.25, 1, 0.01),
)


def test_the_sentence_and_the_table_say_what_was_measured() -> None:
    text = for_readme(summary_of(*RUNS))
    sentence, _, picture, _, *rows = text.splitlines()
    assert picture.endswith("(docs/comparison.png)")
    assert "One UNet call instead of 80, 10 ms an image instead of 500," in sentence
    assert "endpoint error 0.25 instead of 2.00, or 0.40 without its guidance" in sentence
    assert rows[2] == "| teacher, 40 steps: the solve itself | 80 | 500 | 0.000 |  | 0.00 |  |"
    assert rows[4].startswith("| teacher, 1 step, no guidance | 1 | 10 | 0.400 ")
    assert rows[5] == "| **student, 1 step** | 1 | 10 | 0.250 |  | 0.25 |  |"
    assert len(rows) == 9
    assert "0.250 [0.125, 0.500]" in for_results(summary_of(*RUNS), "somewhere")
    with pytest.raises(SystemExit, match=r"no measured run of \[\('student', 1, False\)\]"):
        for_readme(summary_of(*RUNS[:-1]))


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_the_pages_have_the_place_once_and_only_it_is_replaced(name: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = (PROJECT_ROOT / name).read_text()
    page.write_text(text)
    put(page, r"figures with \1 in them")
    before, _, rest = text.partition(BEGIN)
    assert page.read_text() == f"{before}{BEGIN}\nfigures with \\1 in them\n{END}{rest.partition(END)[2]}"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="0 places between"):
        put(page, "figures")
