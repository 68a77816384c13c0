from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline import cli
from tests.stage1_teacher.small_teacher import FONT, annotation, write_annotations, write_prompts, write_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    write_teacher(folder)
    write_annotations(folder / "data.json", annotation(0), annotation(1, img_name="none.png"))
    write_prompts(folder / "prompts.jsonl", 2)
    return folder


def invoke(command: str, *arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [command, *map(str, arguments)])


def test_precompute_and_finalize_say_what_was_done(folder: Path) -> None:
    arguments = (
        "--config",
        folder / "config.toml",
        "--annotations",
        folder / "data.json",
        "--out",
        folder / "out",
    )
    result = invoke("precompute", *arguments, "--prompts", folder / "prompts.jsonl", "--limit", "3")
    assert result.exit_code == 0, result.output
    assert "1 shards written with 2 records, 0 were there, 1 inputs failed; task 0 of 1" in result.output
    result = invoke("finalize", "--shards", folder / "out")
    assert result.exit_code == 0, result.output
    assert "complete, 2 samples in 1 shards" in result.output
    assert "1 inputs failed: image missing" in result.output
    assert (folder / "out" / "summary.json").exists()


def test_dry_run_prints_the_resolved_configuration_and_does_nothing(folder: Path) -> None:
    arguments = (
        "--config",
        folder / "config.toml",
        "--prompts",
        folder / "prompts.jsonl",
        "--out",
        folder / "dry",
    )
    result = invoke("precompute", *arguments, "--dry-run", "--set", "precompute.seed=7")
    assert result.exit_code == 0
    assert json.loads(result.output)["precompute"]["seed"] == 7
    assert not (folder / "dry").exists()


def test_errors_are_one_line_with_the_documented_exit_code(folder: Path, tmp_path: Path) -> None:
    config = ("--config", folder / "config.toml", "--out", tmp_path / "out")
    prompts = ("--prompts", folder / "prompts.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"captoin": 1}\n')
    cases: list[tuple[int, str, tuple[str | Path, ...]]] = [
        (2, "no inputs; give --annotations FILE or --prompts FILE", config),
        (3, "none.json: No such file", (*config, "--annotations", tmp_path / "none.json")),
        (3, "bad.jsonl:1: unknown field 'captoin'", (*config, "--prompts", tmp_path / "bad.jsonl")),
        (2, "unknown key precompute.sead", (*config, *prompts, "--set", "precompute.sead=1")),
        (2, "task 3 of how many? Give --num-tasks", (*config, *prompts, "--task-index", "3")),
        (2, "expected 0 to 1 (of 2 tasks)", (*config, *prompts, "--task-index", "2", "--num-tasks", "2")),
        (
            2,
            "model.checkpoint is empty",
            (*prompts, "--out", tmp_path / "out", "--set", f"inputs.font={FONT}"),
        ),
    ]
    for code, message, arguments in cases:
        result = invoke("precompute", *arguments)
        assert (result.exit_code, message in result.output) == (code, True), result.output
        assert result.output.count("\n") == 1
    result = invoke("finalize", "--shards", tmp_path)
    assert (result.exit_code, result.output.count("\n")) == (3, 1)
