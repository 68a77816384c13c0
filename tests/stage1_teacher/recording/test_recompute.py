from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from common.errors import DataError
from pipeline import cli
from shards.reading.reader import ShardSet
from shards.writing.writer import ShardWriter
from stage1_teacher.precompute import precompute
from stage1_teacher.recording.recompute import recompute
from tests.stage1_teacher.small_teacher import load, write_prompts, write_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small teacher, and sets of three prompts with their predictions: solved alone, and two side by side."""
    folder = tmp_path_factory.mktemp("small")
    config = write_teacher(folder)
    write_prompts(folder / "prompts.jsonl", 3)
    for size in (1, 2):
        overrides = (f"precompute.batch_size={size}", "precompute.store_predictions=true")
        precompute(load(config, *overrides), folder / f"batch{size}", prompts=[folder / "prompts.jsonl"])
    return folder


def verify(folder: Path, shards: Path, *arguments: str) -> Result:
    command = ["verify", "--config", str(folder / "config.toml"), "--shards", str(shards), "--recompute", "3"]
    return CliRunner().invoke(cli, [*command, *arguments])


def alter(shards: Path, index: int, amount: float) -> None:
    """Write the only shard anew, soundly, with one value of one record's x0 changed."""
    opened = ShardSet.open(shards)
    records = list(opened)
    latents = records[index].rollout_latents.clone()
    latents[0, -1, 1, 2, 3] += amount
    records[index] = dataclasses.replace(records[index], rollout_latents=latents)
    (shards / "shard-000000.json").unlink()
    with ShardWriter(shards, 0, identity_sha256=opened.manifest.identity_sha256, provenance={}) as writer:
        for number, record in enumerate(records):
            writer.add(number, record)
        writer.commit()


def test_a_set_solved_one_by_one_is_found_again_to_the_bit(folder: Path) -> None:
    results = list(recompute(load(folder / "config.toml"), ShardSet.open(folder / "batch1"), range(3)))
    assert [result.index for result in results] == [0, 1, 2]
    assert [result.largest for result in results] == [0.0, 0.0, 0.0]


def test_a_set_solved_side_by_side_is_found_again_within_the_tolerance(folder: Path) -> None:
    result = verify(folder, folder / "batch2")
    assert result.exit_code == 0, result.output
    assert result.output.count("largest difference") == 4  # of three records, and of all


def test_altered_latents_in_a_sound_shard_are_reported(folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "altered"
    shutil.copytree(folder / "batch1", shards)
    alter(shards, 1, 0.5)
    assert CliRunner().invoke(cli, ["verify", "--shards", str(shards)]).exit_code == 0  # hashes know nothing of it
    result = verify(folder, shards)
    assert result.exit_code == 3
    found = {int(n): float(d) for n, d in re.findall(r"record (\d) .*difference (\S+)", result.output)}
    assert found[0] == found[2] == 0 and abs(found[1] - 0.5) < 5e-3
    assert re.search(r"recomputed records differ by (4\.9|5\.0)\d?e-01, expected at most 0\.05", result.output)
    assert verify(folder, shards, "--tolerance", "1").exit_code == 0


def test_another_teacher_is_refused(folder: Path, tmp_path: Path) -> None:
    other = load(write_teacher(tmp_path, seed="another"))
    with pytest.raises(DataError, match="configured teacher's fingerprint is"):
        list(recompute(other, ShardSet.open(folder / "batch1"), [0]))
