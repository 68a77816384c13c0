from __future__ import annotations

from pathlib import Path

from bench.comparison import Along, Differences, Row, write_page
from stage2_student.evaluation.metrics import Estimate


def row(inputs: int, steps: int, error: float) -> Row:
    return Row(
        name=f"{inputs} inputs",
        phases=2,
        facts={"steps": str(steps)},
        error=Estimate(value=error, low=error * 0.9, high=error * 1.1, count=8),
        of_seeds=(error,),
        sen_acc=None,
        color_acc=None,
        kid=None,
        against=Differences(),
    )


def test_the_chart_has_a_curve_for_each_number_of_inputs(tmp_path: Path) -> None:
    rows = [row(inputs, steps, 1 / (inputs * steps)) for inputs in (100, 1000) for steps in (50, 100, 200)]
    along = Along(name="steps", place=lambda row: int(row.facts["steps"]))
    write_page(tmp_path, "curve", "Inputs", "measured", rows, along)
    chart = (tmp_path / "curve.html").read_text()
    assert "KID against" not in chart  # it was not measured
    assert chart.index("100 inputs") < chart.index("1000 inputs")
    for one in rows:
        assert f"{one.name}, {one.facts['steps']} steps: {one.error.value:.4f}" in chart
    for tick in ("50", "100", "200"):
        assert f">{tick}<" in chart
