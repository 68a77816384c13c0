"""A disk that fails at any one operation loses nothing that was committed and lets nothing wrong be read."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import DataError, MachineError
from shards.files.locks import remove_leftovers, temporaries
from shards.looking.verify import verify_set
from shards.reading.reader import ShardSet
from tests.shards.builders import assert_same_record, make_record, write_set
from tests.shards.faults import FaultyFiles

IDS = ["a", "b", "bad", "c"]


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where thousands of fsyncs cost nothing."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_what_is_committed(folder: Path) -> int:
    try:
        shards = ShardSet.open(folder, allow_incomplete=True)
    except DataError:
        return 0  # no manifest yet, or nothing committed
    for record in shards:
        assert_same_record(record, make_record(record.meta.input_id))
    return len(shards)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_whichever_operation_of_a_run_fails_the_next_run_ends_with_the_same_bytes(
    fast_folder: Path, number: int, for_good: bool
) -> None:
    write_set(fast_folder / "whole", IDS, samples_per_shard=2)
    whole = listing(fast_folder / "whole")
    survived = 0
    for fail_at in range(1, 10_000):
        folder = fast_folder / str(fail_at)
        folder.mkdir()
        faults = FaultyFiles(fail_at, number, for_good=for_good)
        try:
            with faults.armed():
                remove_leftovers(folder)
                write_set(folder, IDS, samples_per_shard=2)
        except (OSError, DataError, MachineError) as error:
            assert number in (getattr(error, "errno", None), getattr(error.__cause__, "errno", None))
        else:
            survived += faults.reached
            left = {name: data for name, data in listing(folder).items() if not name.endswith(".tmp")}
            assert left == whole, f"a run that reported success after operation {fail_at} failed"
        read_what_is_committed(folder)
        remove_leftovers(folder)
        write_set(folder, IDS, samples_per_shard=2)
        empty = {name for name, data in listing(folder).items() if name.endswith(".tmp") and not data}
        assert {name: data for name, data in listing(folder).items() if name not in empty} == whole
        assert read_what_is_committed(folder) == 3
        shutil.rmtree(folder)
        if not faults.reached:
            break
    # failures that harm nothing are few: closing a file that was only read, advice to the kernel
    assert fail_at > 100 and survived <= 12


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_whichever_read_fails_no_record_comes_out_wrong(tmp_path: Path, for_good: bool) -> None:
    write_set(tmp_path / "set", IDS, samples_per_shard=2)
    for fail_at in range(1, 10_000):
        faults = FaultyFiles(fail_at, errno.EIO, for_good=for_good)
        ids = []
        try:
            with faults.armed():
                shards = ShardSet.open(tmp_path / "set")
                for record in shards:
                    assert_same_record(record, make_record(record.meta.input_id))
                    ids.append(record.meta.input_id)
        except (OSError, DataError, MachineError):
            pass
        else:
            assert ids == ["a", "b", "c"]
        if not faults.reached:
            break
    assert fail_at > 30


def test_verify_reports_a_disk_that_cannot_be_read(tmp_path: Path) -> None:
    write_set(tmp_path / "set", IDS, samples_per_shard=2)
    shards = ShardSet.open(tmp_path / "set")
    faults = FaultyFiles(1, errno.EIO, for_good=True)
    with faults.armed():
        found = list(verify_set(shards, num_threads=1))
    assert len(found) == 2 and all("Input/output error" in damage.message and damage.unread for damage in found)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_a_disk_that_is_really_full_loses_nothing(tmp_path: Path) -> None:
    ids = [f"in{number:04d}" for number in range(24)]
    write_set(tmp_path / "whole", ids)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", disk], capture_output=True).returncode:
        pytest.skip("this machine's root may not mount")
    try:
        folder = disk / "set"
        with pytest.raises((MachineError, OSError), match="No space left on device"):
            write_set(folder, ids)
        committed = read_what_is_committed(folder)
        assert 4 <= committed < 24 and temporaries(folder) == []
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        write_set(folder, ids)
        assert listing(folder) == listing(tmp_path / "whole")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
