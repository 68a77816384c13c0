from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from common.config import PROJECT_ROOT
from pipeline import cli

README = (PROJECT_ROOT / "README.md").read_text()


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "pipeline.py", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False, timeout=280)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_is_in_the_readme_and_explains_itself_with_an_example(name: str) -> None:
    assert f"| `{name}`" in README
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert f"pipeline.py {name}" in result.output.split("Options:")[0].split("\n", 1)[1]


def test_help_starts_no_heavy_library() -> None:
    code = (
        "import sys, pipeline\n"
        "try: pipeline.cli(args=['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'both_stages', 'stage1_teacher', 'stage2_student'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", ["status", "inspect", "verify"])
def test_looking_at_a_set_loads_no_torch(command: str, tmp_path: Path) -> None:
    code = (
        "import sys, pipeline\n"
        f"try: pipeline.cli(args=['{command}', '--shards', sys.argv[1]])\n"
        "except SystemExit as end: code = end.code\n"
        "sys.exit(99 if 'torch' in sys.modules else code)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 3, result.stderr  # there is no set


def test_submitting_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, pipeline\n"
        "try: pipeline.cli(args=['submit', 'train', '--shards', 'set', '--out', sys.argv[1], '--dry-run'])\n"
        "except SystemExit as end: code = end.code\n"
        "sys.exit(99 if 'torch' in sys.modules else code)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "#SBATCH" in result.stdout


def test_dry_run_prints_the_resolved_configuration(tmp_path: Path) -> None:
    result = run("train", "--config", "configs/tiny.toml", "--shards", tmp_path, "--out", tmp_path / "run",
                 "--set", "train.max_steps=7", "--dry-run")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["train"]["max_steps"] == 7
    assert not (tmp_path / "run").exists()


TINY, FULL = ("--config", "configs/tiny.toml"), ("--config", "configs/sd15.toml")
DATA = "tests/golden/data/data.json"
TO = ("--shards", "no-such-folder", "--out", "build/refused")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("train", "--config", "none.toml", *TO), 2, "none.toml"),
        (("train", *TINY, "--set", "train.max_step=1", *TO), 2, "did you mean max_steps"),
        (("train", *TINY, *TO), 3, "no-such-folder"),
        (("precompute", *FULL, "--annotations", DATA, "--out", "build/refused"), 3, "model.checkpoint"),
        (("no-such-command",), 2, "No such command"),
    ],
)
def test_a_user_error_is_one_line_with_the_documented_exit_code(
    arguments: tuple[str, ...], code: int, said: str
) -> None:
    result = run(*arguments)
    assert result.returncode == code, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.lower().startswith("error")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback() -> None:
    result = run("train", "--config", "none.toml", "--shards", "x", "--out", "build/refused", "--debug")
    assert "Traceback" in result.stderr
