from __future__ import annotations

import dataclasses
import json
import re
import shlex
from html import unescape
from pathlib import Path

import pytest
from click.testing import CliRunner

from common.config import PROJECT_ROOT, load_config
from pipeline import cli
from shards.files.frozen import FrozenSet, write_frozen
from stage2_student.report.commands import commands, from_root
from stage2_student.report.data import ReportData, Training, gather
from stage2_student.report.page import write_report
from tests.stage2_student.report.crowded import HOSTILE
from tests.stage2_student.report.rows import summary_of

OUT = Path("report.html")


def data_of(folder: Path, *trainings: Training, command: str = "pipeline.py evaluate --out x") -> ReportData:
    return ReportData(
        folder=folder,
        summary=summary_of(),
        examples=(),
        num_examples=3,
        trainings=trainings,
        invocations=({"command": command},),
    )


def training_of(folder: Path, config: dict[str, object], location: str, **excluded: list[str]) -> Training:
    shards = FrozenSet(location=location, identity_sha256="0", shards=(), excluded=excluded)
    return Training(folder=folder, losses=(), config=config, shards=shards)


def test_a_training_command_resolves_to_the_same_configuration(tmp_path: Path) -> None:
    sets = ('lora.targets=["to_q","ff.*"]', "train.loss=l2", 'model.checkpoint="true"', "train.learning_rate=1e-5")
    config = load_config(PROJECT_ROOT / "configs" / "tiny.toml", sets)
    kept = config.as_dict()
    command, *_ = commands(data_of(tmp_path, training_of(tmp_path / "a run", kept, "s3://bucket/set")), OUT, "t")
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "pipeline.py")
    assert arguments[-6:] == ["--shards", "s3://bucket/set", "--out", f"{tmp_path}/a run", "--resume", "auto"]
    result = CliRunner().invoke(cli, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    resolved = json.loads(result.output)
    for section in ("model", "shards", "train", "lora"):
        assert resolved[section] == kept[section]


def test_paths_in_the_project_are_written_from_its_root(tmp_path: Path) -> None:
    assert from_root(PROJECT_ROOT / "runs" / "a") == "runs/a"
    assert from_root(tmp_path / "a") == str(tmp_path / "a")
    training = training_of(PROJECT_ROOT / "runs" / "a", {}, str(PROJECT_ROOT / "set"), shard=["key"])
    command, *_ = commands(data_of(tmp_path, dataclasses.replace(training, config={"train": {}})), OUT, "t")
    assert command == "python pipeline.py train --shards set --exclude-damaged --out runs/a --resume auto"


def test_what_a_run_does_not_say_is_said(tmp_path: Path) -> None:
    bare = Training(folder=tmp_path / "bare", losses=(), config={})
    command, *_ = commands(data_of(tmp_path, bare), OUT, "t")
    assert command == f"# how bare was trained is not known: no config.json and no shards.json in {tmp_path}/bare"


@pytest.mark.parametrize(
    ("noted", "shown"),
    [
        ("pipeline.py evaluate --out x", "python pipeline.py evaluate --out x"),
        ("'/a b/pipeline.py' evaluate", "python '/a b/pipeline.py' evaluate"),
        ("python pipeline.py evaluate", "python pipeline.py evaluate"),
        ("/usr/bin/anytext evaluate", "/usr/bin/anytext evaluate"),
    ],
)
def test_an_evaluate_command_can_be_pasted(tmp_path: Path, noted: str, shown: str) -> None:
    assert commands(data_of(tmp_path, command=noted), OUT, "t")[0] == shown


def test_the_report_command_on_the_page_makes_the_same_page(
    crowded: Path, trainings: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "my report.html"
    write_report(path, gather(crowded, trainings, 2), HOSTILE)
    page = path.read_text()
    lines = [unescape(line.strip()) for line in re.findall(r"<code>(.*?)</code>", page, re.DOTALL)]
    assert [shlex.split(line)[2] for line in lines] == ["train"] * 7 + ["evaluate", "report"]
    path.unlink()
    result = CliRunner().invoke(cli, shlex.split(lines[-1])[2:])
    assert result.exit_code == 0, result.output
    assert path.read_text() == page


def test_damaged_shard_lists_are_one_line(crowded: Path, trainings: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_bytes((trainings[0] / "log.jsonl").read_bytes())
    write_frozen(run, FrozenSet(location="/set", identity_sha256="0", shards=(), excluded={})).write_bytes(b"{")
    arguments = ["--evaluation", str(crowded), "--run", str(run), "--out", str(tmp_path / "report.html")]
    result = CliRunner().invoke(cli, ["report", *arguments])
    assert (result.exit_code, result.output.count("\n")) == (3, 1)
