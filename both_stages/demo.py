"""The demo: the ordinary commands of both stages, one after another, on the embedded tiny teacher."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common.config import PROJECT_ROOT

TINY = ("--config", "configs/tiny.toml")


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
        steps: training steps.
        layouts: held-out inputs, measured.
    """
    out = Path(os.path.relpath(out.absolute(), PROJECT_ROOT))  # the commands are run, and shown, from there
    data, held_out, shards, run = out / "data", out / "held_out", out / "shards", out / "run"
    evaluation, page = out / "evaluation", out / "report.html"
    sheet, comparison = out / "contact_sheet.png", out / "comparison.png"
    training = ("--set", f"train.max_steps={steps}", "--set", f"train.checkpoint_every={max(steps // 3, 1)}")
    measuring = ("--adapter", run, "--truth", "--set", f"evaluate.num_samples={layouts}")

    def step(name: str, result: Path, *arguments: object) -> Step:
        return Step(name=name, arguments=tuple(map(str, arguments)), result=result)

    def generate(name: str, folder: Path, *arguments: object) -> Step:
        return step(name, folder / "data.json", "-m", "stage1_teacher.tiny.data", *arguments, "--out", folder)

    def command(name: str, result: Path, *arguments: object) -> Step:
        return step(name, result, "pipeline.py", name, *arguments)

    return [
        generate("generate data", data, "--count", count),
        command("precompute", shards, *TINY, "--annotations", data / "data.json", "--out", shards),
        command("finalize", shards / "summary.json", "--shards", shards),
        command("inspect", sheet, *TINY, "--shards", shards, "--out", sheet),
        command("train", run, *TINY, *training, "--shards", shards, "--out", run, "--resume", "auto"),
        command("compare", comparison, *TINY, "--shards", shards, "--adapter", run, "--out", comparison),
        generate("held-out data", held_out, "--count", layouts, "--seed", 1),
        command(
            "evaluate",
            evaluation / "evaluation.json",
            *(*TINY, *measuring, "--annotations", held_out / "data.json", "--out", evaluation),
        ),
        command("report", page, "--evaluation", evaluation, "--run", run, "--out", page),
    ]
