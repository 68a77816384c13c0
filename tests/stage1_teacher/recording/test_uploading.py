from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from pipeline import cli
from shards.reading.reader import ShardSet
from shards.remote import connection as remote
from shards.trajectories import TrajectoryStore
from tests.stage1_teacher.small_teacher import write_prompts, write_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small teacher and five prompts: two shards."""
    folder = tmp_path_factory.mktemp("small")
    write_teacher(folder)
    write_prompts(folder / "prompts.jsonl", 5)
    return folder


def run(folder: Path, out: Path, *arguments: object) -> Result:
    fixed = ["--config", folder / "config.toml", "--prompts", folder / "prompts.jsonl", "--out", out]
    return CliRunner().invoke(cli, ["precompute", *map(str, [*fixed, *arguments])])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("shard-*") if path.is_file()}


def test_a_set_is_uploaded_as_it_is_made_and_reads_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARD_CACHE_DIR", str(tmp_path / "cache"))
    out, there = tmp_path / "out", tmp_path / "there"
    for index, sent in ((0, 2), (1, 0)):  # the first finds the other's shard missing, and makes it too
        result = run(folder, out, "--upload", f"file://{there}", "--task-index", index, "--num-tasks", 2,
                     "--trajectories", tmp_path / "t")  # fmt: skip
        assert result.exit_code == 0, result.output
        assert f"{sent} shards uploaded to file://{there}" in result.output
        assert len(names(there)) == 4
    assert all((there / name).read_bytes() == (out / name).read_bytes() for name in names(out))
    assert torch.equal(ShardSet.open(f"file://{there}")[4].rollout_latents, ShardSet.open(out)[4].rollout_latents)
    assert torch.equal(TrajectoryStore(tmp_path / "t").read(4, 2), ShardSet.open(out)[4].rollout_latents[0, 1])
    assert "0 shards uploaded" in run(folder, out, "--upload", f"file://{there}").output


def test_an_upload_that_fails_leaves_the_shard_committed_and_the_next_run_sends_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.001)
    out, there = tmp_path / "out", tmp_path / "there"
    blocked = there / "shard-000001.json"
    blocked.mkdir(parents=True)  # in the way of the last file
    (blocked / "x").touch()
    result = run(folder, out, "--upload", f"file://{there}")
    assert result.exit_code == 3
    assert result.output.count("\n") == 1 and "shard-000001" in result.output, result.output
    assert "2 of this task's 2 shards are committed" in result.output
    assert {"shard-000001.tar", "shard-000001.json"} <= names(out)
    assert {"shard-000000.tar", "shard-000000.json"} <= names(there)
    (blocked / "x").unlink()
    blocked.rmdir()
    before = (out / "shard-000001.tar").stat().st_mtime_ns
    result = run(folder, out, "--upload", f"file://{there}")
    assert result.exit_code == 0 and "0 shards written" in result.output and "1 shards uploaded" in result.output
    assert names(there) == names(out) and (out / "shard-000001.tar").stat().st_mtime_ns == before


def test_another_set_at_the_url_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "manifest.json").write_text("{}")
    result = run(folder, tmp_path / "out", "--upload", f"file://{there}")
    assert result.exit_code == 3 and "manifest.json there is of another set" in result.output
    assert not names(tmp_path / "out")
