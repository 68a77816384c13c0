"""Workers as real processes: what signals, a killed parent and a small /dev/shm do to them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from common.config import PROJECT_ROOT
from common.files import hold
from common.signals import STOPS
from shards.reading.loader import ShardLoader
from shards.reading.reader import ShardSet
from tests.shards.builders import write_set

READ = """
import json, os, sys
from multiprocessing import active_children
from pathlib import Path
from common.files import hold
from shards.reading.loader import ShardLoader
from shards.reading.reader import ShardSet

with hold(Path(sys.argv[2])) as held:
    batches = iter(ShardLoader(ShardSet.open(sys.argv[1]), seed=5, batch_size=8, num_workers=2))
    next(batches)
    print(json.dumps([held, [worker.pid for worker in active_children()]]), flush=True)
    for count in map(int, sys.stdin):
        print(sum(len(next(batches)) for _ in range(count)), flush=True)
"""


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [pid for pid in pids if is_running(pid)]


def test_workers_read_on_when_a_group_is_told_to_stop_and_die_with_their_parent(tmp_path: Path) -> None:
    write_set(tmp_path / "set", 24)
    lock = tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", READ, str(tmp_path / "set"), str(lock)],
        cwd=PROJECT_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    held, workers = json.loads(process.stdout.readline())
    assert held and len(workers) == 2
    with hold(lock) as taken:
        assert not taken
    for worker, number in itertools.product(workers, STOPS):
        os.kill(worker, number)
    process.stdin.write("20\n")
    process.stdin.flush()
    assert process.stdout.readline() == "160\n"
    assert all(map(is_running, workers))

    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # so busy that it would not notice
    process.kill()
    process.wait()
    with hold(lock) as taken:  # at once: the workers have no part in it
        assert taken
    assert wait_until_gone(workers, 2) == []


def test_a_worker_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    write_set(tmp_path, 24)
    others = {worker.pid for worker in active_children()}
    batches = iter(ShardLoader(ShardSet.open(tmp_path), seed=5, batch_size=8, num_workers=1))
    next(batches)
    (worker,) = (worker for worker in active_children() if worker.pid not in others)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    del batches
    assert wait_until_gone([worker.pid], 2) == []


def test_batches_of_workers_need_no_room_in_dev_shm(tmp_path: Path) -> None:
    write_set(tmp_path, 8)
    batch = next(iter(ShardLoader(ShardSet.open(tmp_path), seed=5, batch_size=8, num_workers=1)))
    maps = Path("/proc/self/maps").read_text()
    assert "/memfd:batch" in maps and "/dev/shm/torch" not in maps
    batch.rollout_latents.zero_()  # it is the trainer's own
    fresh = next(iter(ShardLoader(ShardSet.open(tmp_path), seed=5, batch_size=8, num_workers=1)))
    assert fresh.rollout_latents.any()


def test_a_container_with_a_dev_shm_of_64_kb_reads_with_workers(tmp_path: Path) -> None:
    isolate = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*isolate, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no permission to make a mount namespace")
    write_set(tmp_path / "set", 24)
    small = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
    command = [sys.executable, "-c", READ, str(tmp_path / "set"), str(tmp_path / "lock")]
    done = subprocess.run(
        [*isolate, "sh", "-c", small, "sh", *command],
        cwd=PROJECT_ROOT,
        input="20\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "160"
