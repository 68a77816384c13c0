from __future__ import annotations

from pathlib import Path

import pytest

from both_stages.demo import plan_demo
from common.config import PROJECT_ROOT
from pipeline import cli


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
