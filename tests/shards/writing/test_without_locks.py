"""Two writers of one shard where locks do not reach: whatever they do, what is committed is one writer's."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

from shards.files.locks import temporaries
from shards.files.plan import PlannedShard
from shards.looking.verify import audit
from shards.reading.reader import ShardSet
from shards.writing import writer as writing
from shards.writing.writer import ShardWriter, read_committed
from tests.shards.builders import PROVENANCE, join_set, make_record, write_shard

FORK = multiprocessing.get_context("fork")
SHARDS = 12


def no_locks(*_arguments: Any) -> None:
    raise OSError(errno.ENOLCK, "no locks")


def write_against_another(folder: Path, name: str, barrier: Any, won: Any) -> None:
    fcntl.flock = no_locks  # type: ignore[assignment]
    identity = join_set(folder).identity_sha256
    for index in range(SHARDS):
        with ShardWriter(folder, index, identity_sha256=identity, provenance=PROVENANCE) as writer:
            writer.add(index, make_record(f"{name}{index}"))
            barrier.wait()
            header = writer.commit()
            won.put((index, name, writer.has_won, header.sha256))


def test_of_two_writers_of_different_bytes_one_wins_and_the_other_drops_its_copy(tmp_path: Path) -> None:
    manifest, barrier, won = join_set(tmp_path), FORK.Barrier(2), FORK.Queue()
    tasks = [FORK.Process(target=write_against_another, args=(tmp_path, name, barrier, won)) for name in "ab"]
    for task in tasks:
        task.start()
    said = [won.get(timeout=60) for _ in range(2 * SHARDS)]
    for task in tasks:
        task.join()
        assert task.exitcode == 0
    shards = ShardSet.open(tmp_path)
    for index in range(SHARDS):
        header = read_committed(tmp_path, f"shard-{index:06d}.tar", manifest.identity_sha256)
        assert header is not None
        results = [(name, has_won, sha256) for shard, name, has_won, sha256 in said if shard == index]
        assert {sha256 for _name, _won, sha256 in results} == {header.sha256}
        assert [name for name, has_won, _ in results if has_won] == [shards[index].meta.input_id[0]]
    assert audit(tmp_path)[1] == [] and temporaries(tmp_path) == []


def test_a_tar_and_a_sidecar_of_different_writers_are_found_and_made_anew(tmp_path: Path) -> None:
    for name in "ab":
        manifest = join_set(tmp_path / name)
        write_shard(tmp_path / name, PlannedShard(shard_index=0, first_index=0, input_ids=(name,)), manifest)
    mixed, identity = tmp_path / "a", manifest.identity_sha256
    shutil.copy(tmp_path / "b" / "shard-000000.tar", mixed)
    assert read_committed(mixed, "shard-000000.tar", identity) is None
    write_shard(mixed, PlannedShard(shard_index=0, first_index=0, input_ids=("a",)), manifest)
    assert ShardSet.open(mixed)[0].meta.input_id == "a" and audit(mixed)[1] == []


@pytest.mark.parametrize("moment", ["tar", "sidecar"])
def test_another_writer_that_comes_between_tar_and_sidecar_mixes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(writing, "_PATIENCE_SECONDS", 0.05)
    manifest, link, create = join_set(tmp_path), writing.link_new, writing.create_once
    other = PlannedShard(shard_index=0, first_index=0, input_ids=("other",))
    came: list[str] = []

    def come() -> None:
        if not came:
            came.append(moment)
            write_shard(tmp_path, other, manifest)

    def link_new(temporary: Path, path: Path) -> bool:
        done = link(temporary, path)
        if moment == "tar":
            come()  # its tar replaces the one that was just put there, for no sidecar makes it complete
        return done

    def create_once(path: Path, data: bytes) -> bool:
        if moment == "sidecar":
            come()
        return create(path, data)

    monkeypatch.setattr(writing, "link_new", link_new)
    monkeypatch.setattr(writing, "create_once", create_once)
    with ShardWriter(tmp_path, 0, identity_sha256=manifest.identity_sha256, provenance=PROVENANCE) as writer:
        writer.add(0, make_record("first"))
        header = writer.commit()
    data = (tmp_path / "shard-000000.tar").read_bytes()
    assert came and hashlib.sha256(data).hexdigest() == header.sha256
    assert ShardSet.open(tmp_path)[0].meta.input_id == ("first" if writer.has_won else "other")
    assert audit(tmp_path)[1] == []
