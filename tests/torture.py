"""A longer run of injuries than the suite's: kills, faults and flipped bits at random, for as long as asked.

    python -m tests.torture --kills 60 --flips 5000 --seed 0

Prints one table of what was done and what was found, and exits with 1 at the first promise that does not hold.
"""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from common.errors import DataError
from shards.files.locks import remove_leftovers
from shards.looking.verify import verify_set
from shards.reading.reader import ShardSet
from shards.records.codec import encode_record
from tests.shards.builders import flip_bit, input_ids, make_record, write_set
from tests.shards.faults import FaultyFiles

IDS = input_ids(60)
EXPECTED = {input_id: encode_record(make_record(input_id)) for input_id in IDS}


def listing(folder: Path) -> dict[str, bytes]:
    """Return every file that counts; an empty temporary file may be a living writer's."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if data or not name.endswith(".tmp")}


def write_until_killed(folder: Path, delay: float) -> None:
    """Write what is missing, and die by SIGKILL after a while."""
    threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    remove_leftovers(folder)
    write_set(folder, IDS, samples_per_shard=3)
    os._exit(0)


def torture_by_kill(root: Path, whole: dict[str, bytes], kills: int, rng: random.Random) -> str:
    """Kill writers, up to three at a time on one folder, at random moments."""
    done = rounds = 0
    while done < kills:
        folder = root / f"kill{rounds}"
        folder.mkdir()
        rounds += 1
        while True:
            tasks = [
                multiprocessing.get_context("fork").Process(target=write_until_killed, args=(folder, delay))
                for delay in (rng.expovariate(8) for _ in range(rng.randint(1, 3)))
            ]
            for task in tasks:
                task.start()
            for task in tasks:
                task.join()
            done += sum(task.exitcode == -signal.SIGKILL for task in tasks)
            assert all(task.exitcode in (0, -signal.SIGKILL) for task in tasks), [task.exitcode for task in tasks]
            committed = {n: d for n, d in listing(folder).items() if not n.endswith(".tmp")}
            assert committed.items() <= whole.items(), "a killed run left another file than an uninterrupted one"
            if any(task.exitcode == 0 for task in tasks):
                break
        remove_leftovers(folder)
        assert listing(folder) == whole, "killed runs did not end with the bytes of an uninterrupted one"
        shutil.rmtree(folder)
    return f"{done} SIGKILLs over {rounds} sets: each ended byte-identical"


def torture_by_fault(root: Path, whole: dict[str, bytes]) -> str:
    """Fail every single operation of a run, once and for good, with EIO and ENOSPC."""
    count = 0
    for number in (errno.EIO, errno.ENOSPC):
        for for_good in (False, True):
            for fail_at in range(1, 10**6):
                folder = root / "fault"
                folder.mkdir()
                faults = FaultyFiles(fail_at, number, for_good=for_good)
                try:
                    with faults.armed():
                        write_set(folder, IDS[:6], samples_per_shard=3)
                except (DataError, OSError):
                    pass
                else:
                    written = {n: d for n, d in listing(folder).items() if not n.endswith(".tmp")}
                    assert written == whole, f"reported success after operation {fail_at} failed"
                remove_leftovers(folder)
                write_set(folder, IDS[:6], samples_per_shard=3)
                assert listing(folder) == whole, f"after operation {fail_at} failed"
                shutil.rmtree(folder)
                count += 1
                if not faults.reached:
                    break
    return f"{count} faults: the next run always ended byte-identical"


def torture_by_flip(folder: Path, flips: int, rng: random.Random) -> str:
    """Flip random bits of random files, one at a time; read every record and verify."""
    names = sorted(path.name for path in folder.glob("shard-*.*"))
    refused = harmless = 0
    for _ in range(flips):
        path = folder / rng.choice(names)
        whole = path.read_bytes()
        flip_bit(path, rng.randrange(8 * len(whole)))
        wrong = 0
        found: list[str] = []
        try:
            shards = ShardSet.open(folder)
        except DataError as error:
            found, wrong = [str(error)], 1
        else:
            found = [damage.message for damage in verify_set(shards, 1)]
            for index in range(len(shards)):
                try:
                    record = shards[index]
                except DataError as error:
                    assert path.stem in str(error)
                    wrong += 1
                else:
                    assert encode_record(record) == EXPECTED[record.meta.input_id], (
                        "a damaged record was handed out"
                    )
        assert found and all(path.stem in line for line in found), f"{path.name}: not found by verify"
        refused, harmless = refused + (wrong > 0), harmless + (wrong == 0)
        path.write_bytes(whole)
    return f"{flips} flipped bits: {refused} refused by name, {harmless} changed no record, verify found all"


def main() -> int:
    """Run everything in memory if there is a /dev/shm, else in the temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--flips", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        root = Path(name)
        write_set(root / "whole", IDS, samples_per_shard=3)
        write_set(root / "small", IDS[:6], samples_per_shard=3)
        started = time.monotonic()
        for part in (
            lambda: torture_by_kill(root, listing(root / "whole"), arguments.kills, rng),
            lambda: torture_by_fault(root, listing(root / "small")),
            lambda: torture_by_flip(root / "small", arguments.flips, rng),
        ):
            try:
                sys.stdout.write(f"{part()} ({time.monotonic() - started:.0f} s)\n")
            except AssertionError as error:
                sys.stdout.write(f"BROKEN PROMISE: {error}\n")
                return 1
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
