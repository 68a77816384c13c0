from __future__ import annotations

from pathlib import Path

import pytest

from both_stages.demo import describe_gain, plan_demo
from common.config import PROJECT_ROOT
from pipeline import cli
from stage2_student.evaluation.metrics import Estimate
from stage2_student.evaluation.table import RunRow
from tests.stage2_student.report.rows import run_row, summary_of


def test_every_command_of_the_demo_is_one_that_the_program_takes(tmp_path: Path) -> None:
    for step in plan_demo(tmp_path, count=8, steps=1, layouts=4):
        program, *arguments = step.arguments
        if program == "pipeline.py":
            context = cli.make_context("pipeline.py", list(arguments))
            _, command, rest = cli.resolve_command(context, list(arguments))
            assert command is not None
            command.make_context(step.name, rest)  # parses, runs nothing


def test_the_demos_paths_are_relative_to_the_project_wherever_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in plan_demo(Path("demo"), count=8, steps=1, layouts=4):
        assert (PROJECT_ROOT / step.result).resolve().is_relative_to(tmp_path.resolve() / "demo")


def far(label: str, kind: str, steps: int, error: float, guidance: float = 3) -> RunRow:
    found = Estimate(value=error, low=error, high=error, count=9)
    settings = {"guidance_scale": guidance} if kind == "teacher" else {}
    return run_row(label, kind, steps=steps, endpoint_error=found, settings=settings)


def test_the_summary_says_whether_the_one_step_student_is_as_near_as_expected() -> None:
    guided = (far("t4", "teacher", 4, 0.2), far("t1", "teacher", 1, 2.0))
    teachers = (*guided, far("u4", "teacher", 4, 0.15, guidance=1), far("u1", "teacher", 1, 0.5, guidance=1))
    near, off = far("near, 1 step", "student", 1, 0.4), far("off, 1 step", "student", 1, 0.41)
    four = far("four, 4 steps", "student", 4, 0.1)
    assert describe_gain(summary_of(*teachers, near, off, four, far("s2", "student", 2, 1.0))) == [
        "near, 1 step: endpoint error 0.400, the teacher's in as few steps 2.000, without guidance 0.500;"
        " 0.200 of the former,"
        " at most 0.2 expected: yes",
        "off, 1 step: endpoint error 0.410, the teacher's in as few steps 2.000, without guidance 0.500;"
        " 0.205 of the former,"
        " at most 0.2 expected: NO",
        "four, 4 steps: endpoint error 0.100, the teacher's in as few steps 0.200, without guidance 0.150",
    ]


def test_the_demo_shows_and_measures_the_teacher_in_as_many_steps_as_each_student(tmp_path: Path) -> None:
    steps = {step.name: step for step in plan_demo(tmp_path, count=8, steps=1, layouts=4)}
    words = steps["evaluate"].arguments
    assert words.count("--adapter") == 2 and {"trailing:40", "trailing:4", "trailing:1@1"} <= set(words)
    assert "train.num_phases=1" in steps["train, 1 step"].arguments
    assert "train.num_phases=4" in steps["train, 4 steps"].arguments
    held_out = str(steps["held-out records"].result)
    assert held_out in steps["compare"].arguments and held_out not in steps["train, 1 step"].arguments
