"""Scripts beside the pipeline end as it does: one line, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.config import PROJECT_ROOT
from common.errors import UsageError
from common.scripts import run_script

DENOISER = "-m stage1_teacher.tiny.train_denoiser --features x --vae x --position x --out x --steps 5"


@pytest.mark.parametrize(
    ("command", "code", "line"),
    [
        (f"{DENOISER} --probe-steps 9", 2, "train_denoiser.py: --probe-steps: received 9, expected fewer than"),
        ("bench/solve_profile.py --annotations x --config nothing.toml", 2, "solve_profile.py: "),
        ("-m stage1_teacher.tiny.data --count 1 --out pyproject.toml/below", 3, "data.py: "),
    ],
)
def test_an_error_for_people_ends_a_script_with_one_line_and_its_code(command: str, code: int, line: str) -> None:
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_a_message_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UsageError("what\n  where")

    with pytest.raises(SystemExit) as ended:
        run_script(fail)
    assert ended.value.code == UsageError.exit_code
    assert capsys.readouterr().err == f"{Path(sys.argv[0]).name}: what where\n"


def test_a_bug_keeps_its_traceback() -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        run_script(fail)
