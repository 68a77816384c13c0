"""The demo: the ordinary commands of both stages, one after another, on the embedded tiny teacher."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common.config import PROJECT_ROOT
from stage2_student.evaluation.table import Summary

TINY = ("--config", "configs/tiny.toml")
TEACHER_STEPS = (40, 8, 4, 2, 1)
"""In which the teacher is measured, on the grid that it was recorded on."""
SHOWN = 4
"""Held-out layouts in the picture, the first ones."""
MOST_OF_TEACHERS_ERROR = 0.2
"""Share of the one-step teacher's endpoint error that the one-step student is to have at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command of the demo."""

    name: str
    arguments: tuple[str, ...]
    """Of python."""
    result: Path
    """What it makes; relative to the project's root, as all paths in its arguments."""

    def run(self) -> int:
        """Run it as a user would, from the project's root; return its exit code."""
        return subprocess.run([sys.executable, *self.arguments], cwd=PROJECT_ROOT, check=False).returncode


def plan_demo(out: Path, *, count: int, steps: int, layouts: int) -> list[Step]:
    """List the demo's commands, in order.

    Args:
        out: folder for everything.
        count: inputs to generate.
        steps: training steps of each of the two students.
        layouts: held-out inputs, measured.
    """
    out = Path(os.path.relpath(out.absolute(), PROJECT_ROOT))  # the commands are run, and shown, from there
    data, shards = out / "data", out / "shards"
    held_out, held_out_shards = out / "held_out", out / "held_out_shards"
    runs = {1: out / "run-1", 4: out / "run"}
    evaluation, page = out / "evaluation", out / "report.html"
    sheet, comparison = out / "contact_sheet.png", out / "comparison.png"
    often = f"train.checkpoint_every={max(steps // 3, 1)}"
    solves = [f"trailing:{number}" for number in TEACHER_STEPS] + [f"trailing:{number}@1" for number in runs]
    grids = [word for solve in solves for word in ("--teacher", solve)]
    students = [word for run in runs.values() for word in ("--adapter", f"student={run}")]

    def of_each(option: str) -> list[object]:
        return [word for run in runs.values() for word in (option, run)]

    def step(name: str, result: Path, *arguments: object) -> Step:
        return Step(name=name, arguments=tuple(map(str, arguments)), result=result)

    def generate(name: str, folder: Path, *arguments: object) -> Step:
        return step(name, folder / "data.json", "-m", "stage1_teacher.tiny.data", *arguments, "--out", folder)

    def precompute(name: str, inputs: Path, folder: Path, *arguments: object) -> Step:
        data = ("--annotations", inputs / "data.json")
        return step(name, folder, "pipeline.py", "precompute", *TINY, *data, "--out", folder, *arguments)

    def train(number: int) -> Step:
        sets = (f"train.num_phases={number}", f"train.max_steps={steps}", often)
        settings = [word for value in sets for word in ("--set", value)]
        place = ("--shards", shards, "--out", runs[number], "--resume", "auto")
        name = f"train, {number} step{'s' * (number > 1)}"
        return step(name, runs[number], "pipeline.py", "train", *TINY, *settings, *place)

    def command(name: str, result: Path, *arguments: object) -> Step:
        return step(name, result, "pipeline.py", name, *arguments)

    return [
        generate("generate data", data, "--count", count),
        precompute("precompute", data, shards),
        command("finalize", shards / "summary.json", "--shards", shards),
        command("inspect", sheet, *TINY, "--shards", shards, "--out", sheet),
        *map(train, runs),
        generate("held-out data", held_out, "--count", layouts, "--seed", 1),
        precompute("held-out records", held_out, held_out_shards, "--limit", SHOWN),
        command(
            "compare",
            comparison,
            *(*TINY, "--shards", held_out_shards, "--records", ",".join(map(str, range(SHOWN)))),
            *(*of_each("--adapter"), "--out", comparison),
        ),
        command(
            "evaluate",
            evaluation / "evaluation.json",
            *(*TINY, *students, *grids, "--truth", "--set", f"evaluate.num_samples={layouts}"),
            *("--annotations", held_out / "data.json", "--out", evaluation),
        ),
        command("report", page, "--evaluation", evaluation, *of_each("--run"), "--out", page),
    ]


def describe_gain(summary: Summary) -> list[str]:
    """Say, for each student, how far it is from the teacher's own solve, and the teacher in as few steps."""
    teachers = {
        (run.steps, run.is_unguided): run.endpoint_error.value
        for run in summary.runs
        if run.kind == "teacher" and run.endpoint_error
    }
    lines = []
    for student in (run for run in summary.runs if run.kind == "student"):
        theirs, unguided = (teachers.get((student.steps, alone)) for alone in (False, True))
        if not student.endpoint_error or theirs is None or unguided is None:
            continue
        ours = student.endpoint_error.value
        share = ours / theirs if theirs else math.inf
        line = (
            f"{student.label}: endpoint error {ours:.3f}, the teacher's in as few steps {theirs:.3f},"
            f" without guidance {unguided:.3f}"
        )
        if student.steps == 1:
            verdict = "yes" if share <= MOST_OF_TEACHERS_ERROR else "NO"
            line += f"; {share:.3f} of the former, at most {MOST_OF_TEACHERS_ERROR:g} expected: {verdict}"
        lines.append(line)
    return lines
