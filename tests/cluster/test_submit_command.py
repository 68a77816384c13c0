"""The command line of `submit`: what it hands on, what it refuses, and what it calls."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import pipeline
from common.config import PROJECT_ROOT
from shards.files.names import shard_name, sidecar_name
from tests.shards.builders import input_ids, write_set

TINY = str(PROJECT_ROOT / "configs" / "tiny.toml")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a prompts file, and no job system."""
    (tmp_path / "prompts.jsonl").touch()
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def submit(*words: object) -> Result:
    return CliRunner().invoke(pipeline.cli, ["submit", *map(str, words)])


def precompute(*words: object) -> Result:
    fixed = ("--num-tasks", 4, "--config", TINY, "--prompts", "prompts.jsonl", "--out", "a set")
    return submit("precompute", *fixed, *words)


def install(folder: Path, name: str, body: str) -> None:
    """Put a program in the job system's place: it notes what it is called with."""
    path = folder / "bin" / name
    path.write_text(f'#!/bin/bash\necho {name} "$@" >> {folder}/calls\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    os.environ["PATH"] = f"{folder / 'bin'}:/usr/bin:/bin"


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_a_dry_run_shows_all_and_writes_nothing(here: Path) -> None:
    result = precompute("--train", "run", "--set", "train.max_steps=7", "--limit", 9, "--dry-run")
    assert result.exit_code == 0, result.output
    for name in (
        "a set/jobs/precompute.sbatch",
        "a set/jobs/finalize.sbatch, afterany",
        "run/jobs/train.sbatch, afterok",
    ):
        assert f"# {here}/{name}" in result.output
    assert f"--prompts {here}/prompts.jsonl\n" in result.output
    assert f"--config {TINY}\n" in result.output
    assert "  --limit 9\n" in result.output
    assert result.output.count("--set train.max_steps=7") == 2  # for precompute and train
    assert sorted(path.name for path in here.iterdir()) == ["bin", "prompts.jsonl"]


def test_a_dry_run_shows_what_is_submitted_to_the_letter(here: Path) -> None:
    shown = precompute("--train", "run", "--dry-run").output
    install(here, "sbatch", "echo 7")
    assert precompute("--train", "run").exit_code == 0
    scripts = sorted(here.rglob("*.sbatch"))
    assert [path.stem for path in scripts] == ["finalize", "precompute", "train"]
    for path in scripts:
        script = path.read_text()
        assert script in shown
        assert script.count("--num-tasks") == (path.stem == "precompute")


def test_flags_and_values_of_the_command_are_handed_on(here: Path) -> None:
    result = submit("train", "--config", TINY, "--shards", "set", "--out", "run", "--exclude-damaged", "--dry-run")
    assert f"--shards {here}/set\n" in result.output
    assert "  --exclude-damaged\n" in result.output
    assert "  --resume auto\n" in result.output
    result = submit("train", "--config", TINY, "--shards", "s3://bucket/set", "--out", "run", "--dry-run")
    assert "--shards s3://bucket/set\n" in result.output
    assert "--allow-incomplete" not in result.output


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--set", "cluster.partion=x"), 2, "did you mean partition"),
        (("--set", "cluster.time=00:01:00"), 2, "expected more than the 120 s"),
        (("--prompts", "none.jsonl"), 3, "--prompts none.jsonl: no such file"),
        (("--missing",), 3, "a set"),
        ((), 2, "sbatch: no such program here"),
        (("--set", "cluster.system=kubernetes"), 2, "--prompts prompts.jsonl: received a relative path"),
    ],
)
def test_what_cannot_be_submitted_is_refused_in_a_line(
    here: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    result = precompute(*words)
    assert result.exit_code == code, result.output
    assert said in result.output


def test_inputs_must_be_given(here: Path) -> None:
    result = submit("precompute", "--num-tasks", 4, "--config", TINY, "--out", "set")
    assert (result.exit_code, "no inputs" in result.output) == (2, True)


def test_jobs_are_submitted_in_order_each_after_the_one_before(here: Path) -> None:
    install(here, "sbatch", f"wc -l < {here}/calls")  # the second call is job 3, as scontrol was asked first
    install(here, "scontrol", "echo 'MaxArraySize            = 3'")
    result = precompute("--train", "run")
    assert result.exit_code == 0, result.output
    scripts = [f"{here}/a set/jobs/{name}.sbatch" for name in ("precompute-0", "precompute-1", "finalize")]
    assert calls(here) == [
        "scontrol show config",
        f"sbatch --parsable {scripts[0]}",
        f"sbatch --parsable {scripts[1]}",
        f"sbatch --parsable --dependency=afterany:2:3 --kill-on-invalid-dep=yes {scripts[2]}",
        f"sbatch --parsable --dependency=afterok:4 --kill-on-invalid-dep=yes {here}/run/jobs/train.sbatch",
    ]
    said = result.output.splitlines()
    assert said[0] == f"precompute: job 2; {scripts[0]}, log beside it"
    assert said[2] == f"finalize: job 4, afterany of 2, 3; {scripts[2]}, log beside it"
    assert [Path(script).exists() for script in scripts] == [True] * 3


def test_training_can_wait_for_a_job(here: Path) -> None:
    install(here, "sbatch", "echo '7;cluster'")
    result = submit("train", "--config", TINY, "--shards", "set", "--out", "run", "--after", 5)
    assert "train: job 7, afterok of 5" in result.output
    assert "--dependency=afterok:5 --kill-on-invalid-dep=yes" in calls(here)[-1]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("sbatch: error: invalid partition specified: x", 2),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", 74),
    ],
)
def test_what_slurm_says_decides_whether_to_try_again(here: Path, words: str, code: int) -> None:
    install(here, "sbatch", f"echo {shlex.quote(words)} >&2; exit 1")
    result = precompute()
    assert result.exit_code == code
    assert words in result.output


def test_only_as_many_tasks_as_shards_are_missing_are_submitted(here: Path) -> None:
    write_set(here / "a set", input_ids(12), samples_per_shard=2)
    assert "no shard is missing, nothing is submitted" in precompute("--missing").output
    for index in (1, 5):
        for name in (shard_name(index), sidecar_name(shard_name(index))):
            (here / "a set" / name).unlink()
    result = precompute("--missing", "--dry-run")
    assert "#SBATCH --array=0-1\n" in result.output
    assert "--num-tasks 2\n" in result.output


def test_kubernetes_creates_the_array_and_says_how_the_rest_follows(here: Path) -> None:
    install(here, "kubectl", "echo job.batch/x created")
    settings = ["system=kubernetes", "image=i:1", "namespace=lab", "volumes={'/shards'='shards'}"]
    words = [word for setting in settings for word in ("--set", f"cluster.{setting}")]
    fixed = ("--num-tasks", 4, "--config", TINY, "--prompts", "/data/p.jsonl", "--out", "/shards/one", *words)
    result = submit("precompute", *fixed)
    assert (result.exit_code, "say by --jobs" in result.output) == (2, True)
    result = submit("precompute", *fixed, "--train", "/shards/run", "--jobs", "jobs")
    assert result.exit_code == 0, result.output
    assert calls(here) == [f"kubectl --namespace lab create --filename {here}/jobs/precompute.yaml"]
    _created, finalize, train = result.output.splitlines()
    assert finalize.startswith(
        "then: kubectl --namespace lab wait --for=condition=complete --timeout=-1s job/precompute-"
    )
    assert train.endswith(f"create --filename {here}/jobs/train.yaml")
