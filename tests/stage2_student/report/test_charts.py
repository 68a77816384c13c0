from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from stage2_student.evaluation.metrics import Estimate
from stage2_student.evaluation.table import RunRow, WayRow
from stage2_student.report.charts import Axis, Point, Series, legend, line_chart
from stage2_student.report.data import Training, read_training
from stage2_student.report.distance_plots import error_plot, way_plot
from stage2_student.report.markup import Markup, join, tag
from stage2_student.report.plots import MAX_CURVE_POINTS, accuracy_plot, loss_plot, nice_step
from stage2_student.report.words import percent, points, seconds
from tests.stage2_student.report.rows import run_row, summary_of

AXIS = Axis(label="x", low=1, high=100, ticks=((1, "1"), (10, "10"), (100, "100")), logarithmic=True)
SVG = "{http://www.w3.org/2000/svg}"
SHARE = Axis(label="", low=0, high=1, ticks=((0, "0"), (1, "1")))


def parse(svg: Markup) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{svg}</div>")


def test_markup_escapes_what_is_not_markup() -> None:
    assert tag("p", "a < b & c", tag("b", 1), None, class_="x", title='"', hidden=False) == (
        '<p class="x" title="&quot;">a &lt; b &amp; c<b>1</b></p>'
    )
    assert tag("img", src="a") == '<img src="a">'
    assert join("<", Markup("<br>")) == "&lt;<br>"


def test_a_chart_places_points_by_value_on_both_scales() -> None:
    series = Series(
        label="s", points=(Point(x=1, y=0), Point(x=10, y=0.5, low=0.4, high=0.7), Point(x=100, y=1)), color=0
    )
    root = parse(line_chart("t", [series], AXIS, SHARE, width=460, height=252))
    circles = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.iter(f"{SVG}circle")]
    assert circles == [(46, 212), (246, 112), (446, 12)]
    whisker = next(e for e in root.iter(f"{SVG}line") if e.get("class") == "whisker")
    assert (float(whisker.get("y1", 0)), float(whisker.get("y2", 0))) == (132, 72)


def run(label: str, steps: int, value: float | None, kind: str = "teacher", **settings: object) -> RunRow:
    accuracy = None if value is None else Estimate(value=value, low=value - 0.1, high=value + 0.1, count=9)
    return run_row(label, kind, steps=steps, sen_acc=accuracy, settings=settings)


def test_the_accuracy_plot_has_one_series_per_grid_and_objective_and_no_ablations() -> None:
    runs = [
        run("true images", 0, 1.0, "truth"),
        run("t40", 40, 0.9, grid="trailing:40"),
        run("t4", 4, 0.3, grid="trailing:4"),
        run("u20", 20, 0.9, grid="upstream:20"),
        run("ablated", 20, 0.2, grid="upstream:20", without="attnx"),
        run("a", 4, 0.8, "student", objective="phased"),
        run("b", 4, 0.7, "student", objective="lcm"),
        run("no lines", 4, None, "student", objective="x0"),
    ]
    plot = accuracy_plot(summary_of(*runs))
    assert plot is not None
    root = parse(plot)
    labels = ["".join(item.itertext()) for item in root.iter("li")]
    assert labels == [
        "teacher, trailing grid",
        "teacher, AnyText2's own grid",
        "students, phased",
        "students, lcm",
        "true images, 100.0\u00a0%",
    ]
    assert len(list(root.iter(f"{SVG}circle"))) == 3 * 5
    # The teacher's two points on the trailing grid are joined, nothing else is.
    assert len(list(root.iter(f"{SVG}polyline"))) == 3


def far(label: str, calls: float, error: float, kind: str = "teacher", **more: object) -> RunRow:
    found = Estimate(value=error, low=error * 0.9, high=error * 1.1, count=9)
    settings = {"objective": "phased"} if kind == "student" else {"grid": "trailing:4"}
    costs = {"unet_evaluations": calls, "steps": 1, "settings": settings}
    return run_row(label, kind, endpoint_error=found, **costs, **more)


def test_the_error_plot_has_the_teacher_and_the_students_as_curves_and_not_the_solve_itself() -> None:
    assert error_plot(summary_of(run("t4", 4, 0.3))) is None
    runs = [far("t40", 80, 0.0), far("t4", 8, 0.1), far("t1", 2, 10.0), far("s4", 4, 0.1, "student")]
    plot = error_plot(summary_of(*runs, far("s1", 1, 1.0, "student"), run_row("true images", "truth")))
    assert plot is not None
    root = parse(plot)
    labels = ["".join(item.itertext()) for item in root.iter("li")]
    assert labels == ["teacher, trailing grid", "students, phased"]
    wide = next(root.iter(f"{SVG}svg"), None)
    charts = [svg for svg in root.iter(f"{SVG}svg") if svg.get("class") == "chart"]
    assert wide is not None and len(charts) == 3
    places = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in charts[0].iter(f"{SVG}circle")]
    assert len(places) == 4
    one_call, two_calls, four_calls, eight_calls = sorted(places)
    steps = [b[0] - a[0] for a, b in ((one_call, two_calls), (two_calls, four_calls), (four_calls, eight_calls))]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)  # a doubling is as wide anywhere
    # From 0.1 to 1 it is as high as from 1 to 10.
    assert four_calls[1] - one_call[1] == pytest.approx(one_call[1] - two_calls[1], abs=0.2)
    assert len(list(charts[0].iter(f"{SVG}polyline"))) == 2


def test_the_way_is_plotted_from_the_noise_at_the_left_to_the_image_at_the_right() -> None:
    assert way_plot(summary_of(far("s1", 1, 1.0, "student"))) is None
    way = tuple(
        WayRow(timestep=at, error=Estimate(value=error, low=error, high=error, count=9))
        for at, error in ((749, 0.1), (499, 0.2), (249, 0.3), (-1, 0.4))
    )
    plot = way_plot(summary_of(far("s4", 4, 0.4, "student", way=way)))
    assert plot is not None
    chart = next(svg for svg in parse(plot).iter(f"{SVG}svg") if svg.get("class") == "chart")
    columns = [float(c.get("cx", 0)) for c in chart.iter(f"{SVG}circle")]
    assert columns == sorted(columns) and len(columns) == 4
    assert chart.findall(f".//{SVG}text")[-2].text == "0"  # the last mark of the axis, before its label


def test_runs_of_equal_steps_stand_side_by_side_and_are_not_joined() -> None:
    students = (("a", 1), ("b", 2), ("c", 4), ("d", 4), ("e", 8), ("f", 16))
    runs = [run(name, steps, 0.7, "student", objective="phased") for name, steps in students]
    plot = accuracy_plot(summary_of(*runs, run("t4", 4, 0.7, grid="trailing:4")))
    assert plot is not None
    wide = next(parse(plot).iter(f"{SVG}svg"))
    columns = [float(circle.get("cx", 0)) for circle in wide.iter(f"{SVG}circle")]  # the teacher's comes first
    teacher, one, two, four, also_four, eight, sixteen = columns
    assert one < two < teacher < four < also_four < eight < sixteen
    assert four - teacher == pytest.approx(9, abs=0.11) == also_four - four
    lines = [line.get("points", "").split() for line in wide.iter(f"{SVG}polyline")]
    ends = [[float(spot.partition(",")[0]) for spot in line] for line in lines]
    assert ends == [[one, two], [eight, sixteen]]


def test_no_two_runs_look_the_same_and_none_like_the_teacher() -> None:
    trainings = [Training(folder=Path(f"run-{i}"), losses=((1, 1.0), (2, 0.5)), config={}) for i in range(24)]
    plot = loss_plot(trainings)
    assert plot is not None
    looks = [svg.get("class", "") for svg in parse(plot).iter("svg")]
    assert len(set(looks)) == 24
    assert not {"c0", "c1"} & {part for look in looks for part in look.split()}


def test_labels_of_any_length_have_room_and_do_not_touch() -> None:
    ticks = ((1, "0.000123"), (10, "1"), (11, "1.1"), (100, "2000000"))
    axis = Axis(label="", low=1, high=100, ticks=ticks, logarithmic=True)
    root = parse(line_chart("t", [], axis, axis, width=340, height=270))
    texts = [text for text in root.iter(f"{SVG}text") if text.get("class") == "tick"]
    found = [(text.text, float(text.get("x", 0)), float(text.get("y", 0))) for text in texts]
    assert [text for text, _, _ in found] == ["0.000123", "1", "2000000"] * 2
    for text, column, _ in found[:3]:  # they end there
        assert column - 7.7 * len(text or "") >= 0
    for text, column, _ in found[3:]:
        assert column - 7.7 * len(text or "") / 2 >= 0 and column + 7.7 * len(text or "") / 2 <= 340


def test_a_legend_shows_line_and_marker() -> None:
    entry = parse(legend([Series(label="s", points=(), color=3, dash=1)]))
    swatch = next(entry.iter("svg"))
    assert swatch.get("class") == "swatch series c3 d1"
    assert [child.tag for child in swatch] == ["line", "circle"]


def test_without_steps_there_is_no_accuracy_plot() -> None:
    assert accuracy_plot(summary_of(run("folder", 0, 0.5, "images"))) is None
    assert loss_plot([]) is None


@pytest.mark.parametrize("count", [1, 7, 5000])
def test_loss_curves_of_any_length_are_drawn_with_few_points(count: int) -> None:
    training = Training(folder=Path("a"), losses=tuple((i + 1, 1 / (i + 1)) for i in range(count)), config={})
    plot = loss_plot([training])
    assert plot is not None
    for line in parse(plot).iter(f"{SVG}polyline"):
        assert len(line.get("points", "").split()) <= MAX_CURVE_POINTS
    assert "NaN" not in plot


@pytest.mark.parametrize(("rough", "step"), [(1, 1), (3, 5), (0.11, 0.2), (200, 200), (6, 10)])
def test_ticks_are_at_round_numbers(rough: float, step: float) -> None:
    assert nice_step(rough) == pytest.approx(step)


def test_numbers_are_written_for_reading() -> None:
    assert percent(0.1234) == "12.3\u00a0%"
    assert percent(None) == "–"
    assert points(Estimate(value=-0.051, low=0, high=0, count=9)) == "−5.1"
    assert [seconds(value) for value in (0, 0.0123, 2.5, 123.4)] == ["–", "12 ms", "2.50 s", "123 s"]


def test_the_loss_of_held_out_records_is_a_curve_of_its_own(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 2, "held_out_loss": 0.7}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = read_training(tmp_path)
    assert (training.losses, training.held_out_losses) == (((1, 1.0), (2, 0.5)), ((2, 0.7),))
    plot = loss_plot([training])
    assert plot is not None and f"{tmp_path.name}, held-out records" in plot
    alone = loss_plot([Training(folder=tmp_path, losses=training.losses, config={})])
    assert alone is not None and "held-out" not in alone
