from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stage2_student.evaluation.metrics import Estimate
from stage2_student.evaluation.table import Difference, MapRow, RunRow
from stage2_student.report.data import gather
from stage2_student.report.tables import differences_table, distances_table, map_table, runs_table
from stage2_student.report.words import verdict
from tests.stage2_student.report.rows import run_row


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high, count=9)


def cells(table: str) -> dict[str, str]:
    """Return the cells of a table of one row by their label, without tags."""
    found = re.findall(r'<td data-label="(.*?)">(.*?)</td>', table)
    return {label: re.sub(r"<.*?>", " ", cell).strip() for label, cell in found}


def run(**more: Any) -> RunRow:
    return run_row("a", "student", **more)


def difference(**scores: Estimate | None) -> Difference:
    return Difference(run="b", less="a", **{**dict.fromkeys(("sen_acc", "ned", "color_acc", "ground")), **scores})


def test_colour_and_ground_are_shown_with_their_intervals() -> None:
    shown = cells(runs_table([run(color_acc=estimate(0.7, 0.6, 0.8), ground=estimate(3.25, 2.5, 4))]))
    assert shown["colour"] == "70.0\u00a0% 60.0 to 80.0"
    assert shown["ground ΔE"] == "3.25 2.50 to 4.00"


def test_distances_are_shown_with_their_intervals_and_an_empty_cell_where_there_is_none() -> None:
    assert distances_table([run()]) is None
    far = {
        "endpoint_error": estimate(0.1874, 0.17, 0.2),
        "endpoint_error_inside": estimate(0.4, 0.3, 0.5),
        "endpoint_error_outside": estimate(0.05, 0.04, 0.06),
        "psnr": estimate(28.94, 28, 30),
    }
    assert cells(str(distances_table([run(**far)]))) == {
        "endpoint error": "0.187 0.170 to 0.200",
        "inside boxes": "0.400 0.300 to 0.500",
        "outside": "0.050 0.040 to 0.060",
        "PSNR, dB": "28.9 28.0 to 30.0",
        "UNet calls": "4",
    }
    both = str(distances_table([run_row("true images", "truth", unet_evaluations=0), run(**far)]))
    assert both.count(">–</td>") == 5


def test_what_no_run_has_is_no_column() -> None:
    assert not {"colour", "ground ΔE"} & cells(runs_table([run()])).keys()
    assert runs_table([run(), run(ground=estimate(1, 1, 1))]).count('data-label="ground ΔE"') == 2
    old = difference(sen_acc=estimate(0.1, 0, 0.2))
    assert cells(differences_table([old])) == {"Sen. Acc, points": "+10.0  0.0 to 20.0", "NED, points": "–"}


def test_each_measure_says_whether_it_is_beyond_chance_and_which_way() -> None:
    row = difference(
        sen_acc=estimate(-0.5, -0.686, -0.361),
        ned=estimate(-0.1, -0.2, 0.01),
        color_acc=estimate(0.1, 0.02, 0.2),
        ground=estimate(1.5, 0.25, 2.5),
    )
    table = differences_table([row])
    assert cells(table) == {
        "Sen. Acc, points": "−50.0  worse  −68.6 to −36.1",
        "NED, points": "−10.0  −20.0 to 1.0",
        "colour, points": "+10.0  better  2.0 to 20.0",
        "ground ΔE": "+1.50  worse  0.25 to 2.50",
    }
    assert re.findall(r'class="difference ?(\w*)"', table) == ["worse", "", "better", "worse"]


def test_lines_out_of_the_glyph_map_are_a_column_where_there_are_any() -> None:
    inside = MapRow(in_glyph_map=True, sen_acc=estimate(0.75, 0, 1), ned=estimate(0, 0, 0))
    outside = MapRow(in_glyph_map=False, sen_acc=estimate(0.25, 0, 1), ned=estimate(0, 0, 0))
    assert map_table([run()]) is None and map_table([run(by_map=(inside,))]) is None
    shown = cells(str(map_table([run(by_map=(inside, outside))])))
    assert shown == {"in the map, 9 lines": "75.0\u00a0%", "out of it, 9 lines": "25.0\u00a0%"}


@pytest.mark.parametrize(
    ("low", "high", "less_is_better", "expected"),
    [
        (1, 2, False, "better"),
        (1, 2, True, "worse"),
        (-2, -1, False, "worse"),
        (-2, -1, True, "better"),
        (-1, 1, True, ""),
        (0, 0, False, ""),
    ],
)
def test_a_verdict_is_given_where_the_interval_does_not_hold_0(
    low: float, high: float, less_is_better: bool, expected: str
) -> None:
    assert verdict(estimate(0, low, high), less_is_better) == expected


def test_an_evaluation_with_colours_and_grounds_has_all_columns(crowded: Path) -> None:
    summary = gather(crowded, num_examples=0).summary
    heads = re.findall(r'<th scope="col">(.*?)</th>', runs_table(summary.runs))
    assert heads[4:8] == ["colour", "ground ΔE", "FID", "CLIP score"]
    heads = re.findall(r'<th scope="col">(.*?)</th>', differences_table(summary.differences))
    measures = ["Sen. Acc, points", "NED, points", "colour, points", "ground ΔE", "endpoint error", "PSNR, dB"]
    assert heads == ["", *measures]
    assert any(row.sen_acc is not None and row.sen_acc.high < -0.1 for row in summary.differences)
