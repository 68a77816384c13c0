from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import pytest
import webdataset.writer

from common.errors import DataError, MachineError
from common.files import temporary_path
from shards.files.failures import Failure, count_by_reason, read_failures
from shards.files.locks import is_dead, remove_leftovers, temporaries
from shards.files.plan import PlannedShard, extend_plan
from shards.files.tasks import DEAD_SECONDS, Watch
from shards.looking.finalize import finalize
from shards.looking.verify import audit
from shards.reading.reader import ShardSet
from shards.records.record import Record
from shards.writing.writer import ShardWriter, read_committed
from tests.shards.builders import (
    PROVENANCE,
    assert_same_record,
    flip_bit,
    input_ids,
    is_committed,
    join_set,
    make_record,
    write_set,
    write_shard,
)
from tests.shards.old_bytes import make_old

SHARD = PlannedShard(shard_index=3, first_index=12, input_ids=tuple(input_ids(4)))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_shard_is_a_tar_whose_headers_say_nothing_about_when_and_by_whom(tmp_path: Path) -> None:
    write_shard(tmp_path, SHARD, join_set(tmp_path), predictions=True)
    with tarfile.open(tmp_path / "shard-000003.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:6]] == [
        "000000012.json",
        "000000012.conditioning.safetensors",
        "000000012.rollout.safetensors",
        "000000012.glyphs.png",
        "000000012.positions.png",
        "000000012.x0.safetensors",
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    listed = subprocess.run(
        ["tar", "-tf", tmp_path / "shard-000003.tar"], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split() == [m.name for m in members] and not listed.stderr


def test_the_table_says_where_tar_readers_find_the_members(tmp_path: Path) -> None:
    write_set(tmp_path, [*input_ids(6), "bad"], samples_per_shard=7, predictions=True)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        found = [(member.name, member.offset_data, member.size) for member in tar]
    table = ShardSet.open(tmp_path).table(0)
    assert found == [(f"{entry.key}.{m.name}", m.offset, m.length) for entry in table for m in entry.members]
    data = (tmp_path / "shard-000000.tar").read_bytes()
    last = table[-1].members[-1]
    assert len(data) % tarfile.RECORDSIZE == 0 and not any(data[last.offset + last.length :])


def test_a_tar_whose_members_lie_elsewhere_than_the_table_says_is_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(webdataset.writer.TarWriter):  # type: ignore[misc]
        """Puts something before every member, as another version might."""

        def write(self, sample: dict[str, object]) -> int:
            self.tarstream.addfile(tarfile.TarInfo("note"))
            return super().write(sample)

    monkeypatch.setattr(webdataset.writer, "TarWriter", Other)
    manifest = join_set(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(DataError, match=r"shard-000003\.tar: the tar's headers .* another version of webdataset"):
        write_shard(tmp_path, SHARD, manifest)
    assert {name: data for name, data in listing(tmp_path).items() if data} == before


def test_a_set_begun_with_other_zeros_at_the_end_goes_on(tmp_path: Path) -> None:
    folder, run = tmp_path / "set", tmp_path / "run"
    write_set(folder, 8)
    for shard in ("shard-000000.tar", "shard-000001.tar"):
        new = (folder / shard).read_bytes()
        make_old(folder, shard)
        old = (folder / shard).read_bytes()
        assert len(old) < len(new) and new.rstrip(b"\0") == old.rstrip(b"\0")
    before = ShardSet.open(folder)
    before.freeze(run)
    assert audit(folder)[1] == []
    kept = {name: data for name, data in listing(folder).items() if name.startswith("shard-")}
    ids = write_set(folder, 14)
    assert kept.items() <= listing(folder).items()
    shards = ShardSet.open(folder)
    for record, input_id in zip(shards, ids, strict=True):
        assert_same_record(record, make_record(input_id))
    assert audit(folder)[1] == [] and finalize(folder).samples == 14
    assert ShardSet.open_frozen(run).set_hash == before.set_hash
    flip_bit(folder / "shard-000000.tar", 8 * before.headers[0].bytes - 1)
    assert [line for line in audit(folder)[1] if "shard-000000.tar: the end of the archive" in line]
    write_set(folder, 14)  # what is damaged is written as shards are now
    assert audit(folder)[1] == [] and (folder / "shard-000000.tar").stat().st_size % tarfile.RECORDSIZE == 0


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_set(tmp_path / name, 10)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")


def test_an_interrupted_shard_leaves_nothing_and_starts_over(tmp_path: Path) -> None:
    manifest = join_set(tmp_path)
    before = listing(tmp_path)
    with (
        pytest.raises(KeyboardInterrupt),
        ShardWriter(tmp_path, 3, identity_sha256=manifest.identity_sha256, provenance=PROVENANCE) as writer,
    ):
        writer.add(12, make_record("in0000"))
        raise KeyboardInterrupt
    assert listing(tmp_path) == before
    assert not is_committed(tmp_path, 3, manifest.identity_sha256)


def test_indices_must_rise(tmp_path: Path) -> None:
    manifest = join_set(tmp_path)
    with ShardWriter(tmp_path, 0, identity_sha256=manifest.identity_sha256, provenance={}) as writer:
        writer.add(5, make_record("in0000"))
        with pytest.raises(ValueError, match="rising"):
            writer.add(5, make_record("in0001"))
        with pytest.raises(ValueError, match="rising"):
            writer.fail(Failure(input_id="x", sample_index=4, reason="r", message="m"))


def test_failures_are_written_with_their_reason_and_take_an_index(tmp_path: Path) -> None:
    ids = ["a", "bad1", "b", "c", "bad2", "bad3"]
    write_set(tmp_path, ids, samples_per_shard=3)
    assert [(f.input_id, f.sample_index) for f in read_failures(tmp_path)] == [
        ("bad1", 1),
        ("bad2", 4),
        ("bad3", 5),
    ]
    assert count_by_reason(read_failures(tmp_path)) == {"image missing": 3}
    shards = ShardSet.open(tmp_path)
    assert [shards.key(i) for i in range(3)] == ["000000000", "000000002", "000000003"]
    assert [shards[i].meta.input_id for i in range(3)] == ["a", "b", "c"]
    assert [h.failed for h in shards.headers] == [1, 2]
    (tmp_path / "failures" / "shard-000001.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="shard-000001.jsonl, line 1"):
        list(read_failures(tmp_path))


def test_a_shard_whose_inputs_all_failed_is_committed_and_empty(tmp_path: Path) -> None:
    write_set(tmp_path, ["bad0", "bad1", "x", "y"], samples_per_shard=2)
    shards = ShardSet.open(tmp_path)
    assert len(shards) == 2 and shards.headers[0].shard == "shard-000001.tar"
    with pytest.raises(DataError, match="no committed sample"):
        write_set(tmp_path / "none", ["bad0"])
        ShardSet.open(tmp_path / "none")


def test_of_two_tasks_on_one_shard_the_first_to_commit_wins(tmp_path: Path) -> None:
    manifest = join_set(tmp_path)
    arguments = {"identity_sha256": manifest.identity_sha256, "provenance": PROVENANCE}
    with ShardWriter(tmp_path, 0, **arguments) as slow, ShardWriter(tmp_path, 0, **arguments) as fast:
        slow.add(0, make_record("slow"))
        fast.add(0, make_record("fast"))
        committed = fast.commit()
        before = listing(tmp_path)
        assert slow.commit() == committed
    after = {name: data for name, data in before.items() if not name.endswith(".tmp")}
    assert listing(tmp_path) == after
    assert ShardSet.open(tmp_path)[0].meta.input_id == "fast"


def _write_slowly(folder: Path, start: float, name: str) -> None:
    manifest = join_set(folder)
    time.sleep(max(0, start - time.time()))
    for index in range(6):
        shard = PlannedShard(shard_index=index, first_index=index, input_ids=(f"{name}{index}",))
        write_shard(folder, shard, manifest)


def test_processes_that_race_for_the_same_shards_never_mix_them(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = time.time() + 0.5
    tasks = [context.Process(target=_write_slowly, args=(tmp_path, start, name)) for name in "abc"]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
        assert task.exitcode == 0
    shards = ShardSet.open(tmp_path)
    for index in range(6):
        record = shards[index]
        assert_same_record(record, make_record(record.meta.input_id))
        assert is_committed(tmp_path, index, shards.manifest.identity_sha256)
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "empty", "delete", "sidecar flip", "sidecar delete", "swap"]
)
def test_a_damaged_shard_is_not_complete_and_is_written_again_with_the_same_bytes(
    tmp_path: Path, damage: str
) -> None:
    write_set(tmp_path, 12)
    whole = listing(tmp_path)
    tar, sidecar = tmp_path / "shard-000001.tar", tmp_path / "shard-000001.json"
    if damage == "flip":
        flip_bit(tar, 8 * 3000)
    elif damage == "truncate":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif damage == "empty":
        tar.write_bytes(b"")
    elif damage == "delete":
        tar.unlink()
    elif damage == "sidecar flip":
        flip_bit(sidecar, 8 * 1200)
    elif damage == "sidecar delete":
        sidecar.unlink()
    else:
        shutil.copy(tmp_path / "shard-000000.json", sidecar)
    identity = join_set(tmp_path).identity_sha256
    assert read_committed(tmp_path, tar.name, identity) is None
    assert read_committed(tmp_path, "shard-000000.tar", identity) is not None
    write_set(tmp_path, 12)
    assert listing(tmp_path) == whole


def test_a_shard_of_another_identity_is_not_ours(tmp_path: Path) -> None:
    write_set(tmp_path, 4)
    assert not is_committed(tmp_path, 0, "0" * 64)


def test_added_inputs_extend_the_set_and_leave_committed_shards_alone(tmp_path: Path) -> None:
    write_set(tmp_path, 6)
    before, old = listing(tmp_path), ShardSet.open(tmp_path)
    run = tmp_path.parent / f"{tmp_path.name}-run"
    old.freeze(run)
    write_set(tmp_path, 9)
    after, new = listing(tmp_path), ShardSet.open(tmp_path)
    assert {name: after[name] for name in before} == before
    assert new.set_hash != old.set_hash and (len(old), len(new)) == (6, 9)
    frozen = ShardSet.open_frozen(run)
    assert (frozen.set_hash, len(frozen)) == (old.set_hash, 6)
    assert [new[i].meta.input_id for i in range(9)] == input_ids(9)


def test_leftovers_of_dead_runs_are_removed_and_living_ones_are_not(tmp_path: Path) -> None:
    manifest = join_set(tmp_path)
    dead, foreign, old = (temporary_path(tmp_path / f"{n}.tar") for n in ("dead", "foreign", "old"))
    foreign = foreign.with_name(".f.tar.another-machine.0123456789ab-0.tmp")
    old = old.with_name(".o.tar.another-machine.0123456789ab.tmp")
    for path in (dead, foreign, old):
        path.write_bytes(b"x")
    now = 0.0
    watch = Watch(tmp_path, clock=lambda: now)
    with ShardWriter(tmp_path, 0, identity_sha256=manifest.identity_sha256, provenance={}) as writer:
        writer.add(0, make_record("in0000"))
        living = [path for path in temporaries(tmp_path) if path not in (dead, foreign, old)]
        assert len(living) == 1 and not is_dead(living[0])
        assert remove_leftovers(tmp_path, watch) == [dead.name]  # of other machines nothing is known yet
        now += DEAD_SECONDS
        foreign.write_bytes(b"xy")
        assert remove_leftovers(tmp_path, watch) == [old.name]
        writer.commit()
    assert is_committed(tmp_path, 0, manifest.identity_sha256)
    assert temporaries(tmp_path) == [foreign]


def _write_until_killed(folder: Path, delay: float) -> None:
    threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    remove_leftovers(folder)
    write_set(folder, 40, samples_per_shard=5)
    os._exit(0)


def test_a_writer_killed_again_and_again_ends_with_the_bytes_of_an_uninterrupted_one(tmp_path: Path) -> None:
    write_set(tmp_path / "whole", 40, samples_per_shard=5)
    whole, folder = listing(tmp_path / "whole"), tmp_path / "killed"
    folder.mkdir()
    kills, delay = 0, 0.002
    while True:
        task = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(folder, delay))
        task.start()
        task.join()
        if task.exitcode == 0:
            break
        assert task.exitcode == -signal.SIGKILL
        kills, delay = kills + 1, delay * 1.2
        so_far = {name: data for name, data in listing(folder).items() if not name.endswith(".tmp")}
        assert so_far.items() <= whole.items()
    assert kills >= 5
    remove_leftovers(folder)
    left = {name: data for name, data in listing(folder).items() if data or not name.endswith(".tmp")}
    assert left == whole  # a file not yet written to may be a living writer's: it goes a few seconds later


def test_a_record_that_the_disk_gives_back_wrong_is_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = join_set(tmp_path)
    with ShardWriter(tmp_path, 0, identity_sha256=manifest.identity_sha256, provenance={}) as writer:
        writer.add(0, make_record("in0000"))
        sync = os.fsync

        def corrupt(descriptor: int) -> None:  # a disk that acknowledges, then stores another bit
            sync(descriptor)
            flip_bit(temporaries(tmp_path)[0], 9000)

        monkeypatch.setattr(os, "fsync", corrupt)
        with pytest.raises(MachineError, match="read back other bytes"):
            writer.commit()
    assert not is_committed(tmp_path, 0, manifest.identity_sha256) and temporaries(tmp_path) == []


def test_extend_plan_and_commit_agree_on_a_large_index(tmp_path: Path) -> None:
    manifest = join_set(tmp_path)
    shard = PlannedShard(shard_index=999_999, first_index=999_999_999, input_ids=("last",))
    write_shard(tmp_path, shard, manifest)
    assert ShardSet.open(tmp_path).key(0) == "999999999"
    with pytest.raises(ValueError, match="shard index"):
        ShardWriter(tmp_path, 10**6, identity_sha256="", provenance={})
    assert extend_plan(tmp_path, [], 1).num_shards == 0


def test_records_are_what_was_written(tmp_path: Path) -> None:
    ids = write_set(tmp_path, 7, samples_per_shard=3, rollouts=2, predictions=True)
    shards = ShardSet.open(tmp_path)
    received: list[Record] = list(shards)
    assert len(received) == 7 and shards.has_predictions
    for record, input_id in zip(received, ids, strict=True):
        assert_same_record(record, make_record(input_id, rollouts=2, predictions=True))
