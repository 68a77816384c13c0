from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from common.errors import MachineError, UsageError
from stage2_student.watching import claim as claim_module
from stage2_student.watching.claim import OWNER_FILE, claim_run


def of_another_machine(folder: Path, seconds_ago: float) -> Path:
    """What a watcher of another machine left, where locks do not reach from there."""
    folder.mkdir(parents=True)
    path = folder / OWNER_FILE
    path.write_text(json.dumps({"machine": "elsewhere", "pid": 7, "since": "2026-01-01", "token": "abc"}))
    touched = time.time() - seconds_ago
    os.utime(path, (touched, touched))
    return path


def test_a_second_watcher_is_told_who_watches(tmp_path: Path) -> None:
    with (
        claim_run(tmp_path / "run/watch"),
        pytest.raises(UsageError, match=rf"process {os.getpid()} on .* watches it already.*index\.html"),
        claim_run(tmp_path / "run/watch"),
    ):
        pass
    with claim_run(tmp_path / "run/watch"):
        pass  # whoever ended is no obstacle


def test_a_watcher_that_was_killed_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / "run/watch"
    if (child := os.fork()) == 0:
        with claim_run(folder):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert json.loads((folder / OWNER_FILE).read_bytes())["pid"] == child
    with claim_run(folder):
        assert json.loads((folder / OWNER_FILE).read_bytes())["pid"] == os.getpid()


def test_another_machine_s_watcher_is_one_for_as_long_as_it_says_so(tmp_path: Path) -> None:
    path = of_another_machine(tmp_path / "run/watch", 30)
    with pytest.raises(UsageError, match="process 7 on elsewhere"), claim_run(path.parent):
        pass
    assert json.loads(path.read_bytes())["token"] == "abc"


def test_another_machine_s_dead_watcher_is_no_obstacle(tmp_path: Path) -> None:
    path = of_another_machine(tmp_path / "run/watch", 600)
    with claim_run(path.parent) as claim:
        claim.require()
        assert json.loads(path.read_bytes())["pid"] == os.getpid()
    assert [found.name for found in path.parent.iterdir()] == [".lock"]


def test_a_watcher_that_was_taken_for_dead_writes_nothing_more(tmp_path: Path) -> None:
    folder = tmp_path / "run/watch"
    with claim_run(folder) as claim:
        (folder / OWNER_FILE).unlink()
        path = of_another_machine(tmp_path / "other", 0)
        path.replace(folder / OWNER_FILE)
        with pytest.raises(MachineError, match="process 7 on elsewhere.*took over"):
            claim.require()
    assert json.loads((folder / OWNER_FILE).read_bytes())["token"] == "abc"  # not ours to remove


def test_what_a_crash_left_torn_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / "run/watch"
    folder.mkdir(parents=True)
    (folder / OWNER_FILE).write_text('{"machine": "els')
    with claim_run(folder) as claim:
        claim.require()


def test_a_watcher_says_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_module, "TOUCH_SECONDS", 0.02)
    with claim_run(tmp_path / "run/watch"):
        path = tmp_path / "run/watch" / OWNER_FILE
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime > 2
