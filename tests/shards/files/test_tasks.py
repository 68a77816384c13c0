from __future__ import annotations

import dataclasses
import errno
import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import files
from common.files import (
    canonical_json,
    claim,
    create_once,
    is_locked,
    machine_name,
    open_temporary,
    temporary_file,
    temporary_path,
    write_bytes_atomic,
)
from shards.files import locks
from shards.files.locks import remove_leftovers, state_of, temporaries
from shards.files.names import CLAIMS_DIR
from shards.files.tasks import State, Task, Watch, claimed_by, decode_note, note_path, read_notes, set_aside
from shards.looking.clean import clean
from shards.remote.cache import FileCache

FORK = multiprocessing.get_context("fork")


class Clock:
    """Runs when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def elsewhere(task: Task) -> tuple[Path, bytes]:
    """Leave a note and a claim of a task on another machine; returns the note's file and the claim."""
    note = dataclasses.replace(task.note, token="0123456789ab-1", machine="another-machine", host="another")
    path = note_path(task.folder, note.token)
    path.write_bytes(canonical_json(dataclasses.asdict(note)))
    claim = canonical_json({"token": note.token, "machine": note.machine})
    (task.folder / CLAIMS_DIR / "shard-000001").write_bytes(claim)
    return path, claim


def beat(path: Path, beats: int) -> None:
    note = decode_note(path.read_bytes())
    assert note is not None
    path.write_bytes(canonical_json(dataclasses.asdict(dataclasses.replace(note, beats=beats))))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_bytes_atomic(path, b"content"),
        lambda path: create_once(path, b"content"),
        lambda path: FileCache(path.parent, 0).get(path.name, lambda temporary: temporary.write_bytes(b"content")),
    ],
    ids=["write", "create", "cache"],
)
def test_who_removes_leftovers_lets_a_file_be_until_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], object]
) -> None:
    removed = []

    def after_cleaning(give_name: Callable[..., Any]) -> Callable[..., Any]:
        def give(*paths: Any) -> Any:
            removed.append(remove_leftovers(tmp_path, local=True))
            return give_name(*paths)

        return give

    monkeypatch.setattr(os, "link", after_cleaning(os.link))
    monkeypatch.setattr(Path, "replace", after_cleaning(Path.replace))
    write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"content" and removed == [[]]


def look_at(path: Path) -> None:
    """Hold its lock as long as this process lives, as `is_locked` does for an instant."""
    fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_SH)


@pytest.mark.parametrize("meet", [look_at, Path.unlink], ids=["looked at", "taken for a dead writer's"])
def test_a_writer_whose_file_somebody_meets_before_it_is_locked_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meet: Callable[[Path], None]
) -> None:
    met: list[Path] = []

    def claim_late(descriptor: int) -> bool:
        if not met:
            met.extend(tmp_path.iterdir())
            meet(met[0])
        return claim(descriptor)

    monkeypatch.setattr(files, "claim", claim_late)
    with temporary_file(tmp_path / "file") as (temporary, _file):
        assert temporary != met[0] and is_locked(temporary)
        assert list(tmp_path.iterdir()) == [temporary]
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_locked_and_written_while_it_is_judged_is_not_taken_for_a_dead_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = temporary_path(tmp_path / "file")
    with temporary.open("x+b", buffering=0) as file:

        def see_and_be_late(path: Path) -> bool | None:
            found = is_locked(path)
            assert not found and claim(file.fileno())
            file.write(b"content")
            return found

        monkeypatch.setattr(locks, "is_locked", see_and_be_late)
        assert remove_leftovers(tmp_path) == [] and temporary.exists()


def write_until_killed(folder: Path, ready: Any) -> None:
    with Task(folder, 0, 2):
        opened = open_temporary(folder / "shard-000000.tar")  # empty, as while its first records are solved
        ready.set()
        time.sleep(100)
        opened[1].close()


def test_an_empty_file_goes_before_its_tasks_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its file was judged, and before its note was: without the note the file would count as new."""
    with Task(tmp_path, 1, 2) as task:
        ready = FORK.Event()
        process = FORK.Process(target=write_until_killed, args=(tmp_path, ready))
        process.start()
        assert ready.wait(20)

        def judge_and_kill(path: Path, watch: Watch, *, local: bool = False) -> State:
            found = state_of(path, watch, local=local)
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            return found

        with monkeypatch.context() as patch:
            patch.setattr(locks, "state_of", judge_and_kill)
            remove_leftovers(tmp_path, task.watch)
        remove_leftovers(tmp_path, task.watch)
        assert not temporaries(tmp_path) and [note.task_index for note in read_notes(tmp_path)] == [1]


def test_a_claim_keeps_others_out_until_it_is_released(tmp_path: Path) -> None:
    with Task(tmp_path, 0, 2) as first, Task(tmp_path, 1, 2) as second:
        assert first.claim("shard-000000") is None
        assert second.claim("shard-000000") is State.ALIVE
        first.release("shard-000000")
        assert second.claim("shard-000000") is None
        assert [note.task_index for note in read_notes(tmp_path)] == [0, 1]
    assert not read_notes(tmp_path) and not list((tmp_path / CLAIMS_DIR).iterdir())


def hold_until_killed(folder: Path) -> None:
    with Task(folder, 1, 2) as task:
        task.claim("shard-000000")
        time.sleep(100)


def test_the_claim_of_a_killed_task_of_this_machine_is_free_at_once(tmp_path: Path) -> None:
    other = FORK.Process(target=hold_until_killed, args=(tmp_path,))
    other.start()
    while not (tmp_path / CLAIMS_DIR / "shard-000000").exists():
        time.sleep(0.01)
    with Task(tmp_path, 0, 2) as task:
        assert task.claim("shard-000000") is State.ALIVE
        os.kill(other.pid or 0, signal.SIGKILL)
        other.join()
        assert task.claim("shard-000000") is None


def test_an_empty_file_waits_for_its_lock_unless_its_task_is_gone(tmp_path: Path) -> None:
    def begin_a_shard_and_die() -> None:
        with Task(tmp_path, 1, 2):
            temporary_path(tmp_path / "shard-000001.tar").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with Task(tmp_path, 0, 2) as living:
        mine = temporary_path(tmp_path / "shard-000000.tar")
        mine.touch()  # not locked yet
        killed = FORK.Process(target=begin_a_shard_and_die)
        killed.start()
        killed.join()
        assert len(temporaries(tmp_path)) == 2
        remove_leftovers(tmp_path, living.watch)
        assert temporaries(tmp_path) == [mine]


def test_another_machines_task_is_dead_when_its_counter_stood_still_by_the_watchers_own_clock(
    tmp_path: Path, clock: Clock
) -> None:
    watch = Watch(tmp_path, clock=clock)
    with Task(tmp_path, 0, 2, watch=watch) as task:
        note, _claim = elsewhere(task)
        assert task.claim("shard-000001") is State.UNSURE
        for year in (1990, 2090):  # what the times of files and the clocks of machines say is nothing
            os.utime(note, ((year - 1970) * 31_556_952.0,) * 2)
            assert task.claim("shard-000001") is State.UNSURE
        for beats in range(1, 4):
            clock.now += 0.9 * watch.seconds
            beat(note, beats)
            assert task.claim("shard-000001") is State.ALIVE
        clock.now += 0.9 * watch.seconds
        assert task.claim("shard-000001") is State.ALIVE
        clock.now += 0.1 * watch.seconds
        assert task.claim("shard-000001") is None


def test_a_claim_without_a_note_is_watched_like_one_that_stands_still(tmp_path: Path, clock: Clock) -> None:
    watch = Watch(tmp_path, clock=clock)
    with Task(tmp_path, 0, 2, watch=watch) as task:
        note, _claim = elsewhere(task)
        note.unlink()
        assert task.claim("shard-000001") is State.UNSURE  # its note may only be late
        clock.now += watch.seconds
        assert task.claim("shard-000001") is None


def no_locks(*_arguments: Any) -> None:
    raise OSError(errno.ENOLCK, "no locks")


def test_without_locks_tasks_of_one_machine_are_told_by_their_counters_too(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    watch = Watch(tmp_path, clock=clock)
    with Task(tmp_path, 0, 2, watch=watch) as task, Task(tmp_path, 1, 2) as other:
        assert other.claim("shard-000000") is None
        assert task.claim("shard-000000") is State.UNSURE
        other.say()
        assert task.claim("shard-000000") is State.ALIVE
        clock.now += watch.seconds
        assert task.claim("shard-000000") is None
        other.release("shard-000000")  # it was taken away: nothing happens
        assert other.claim("shard-000000") is not None


def test_what_is_no_claim_of_ours_holds_nobody_up(tmp_path: Path) -> None:
    assert claimed_by(Watch(tmp_path), b"x") is State.DEAD
    assert claimed_by(Watch(tmp_path), canonical_json({"token": "x-1", "machine": machine_name()})) is State.DEAD


def test_a_file_that_took_the_name_meanwhile_is_put_back(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    path.write_bytes(b"new")
    assert not set_aside(path, b"old")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    assert set_aside(path, b"new") and not set_aside(path, b"new")


def make_once(folder: Path, index: int) -> None:
    with Task(folder, index, 8) as task:
        with task.claimed("plan", lambda: (folder / "made").exists()) as is_mine:
            if is_mine:
                (folder / f"by-{index}").touch()
                time.sleep(0.2)
                (folder / "made").touch()
        assert (folder / "made").exists()


def test_of_tasks_that_start_together_one_makes_what_all_need_and_the_others_wait(tmp_path: Path) -> None:
    tasks = [FORK.Process(target=make_once, args=(tmp_path, index)) for index in range(8)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
        assert task.exitcode == 0
    assert len(list(tmp_path.glob("by-*"))) == 1


def test_clean_removes_what_the_dead_left_and_nothing_of_the_living(tmp_path: Path, clock: Clock) -> None:
    watch = Watch(tmp_path, clock=clock)
    with Task(tmp_path, 0, 2) as living:
        assert living.claim("shard-000000") is None
        note, _claim = elsewhere(living)
        (tmp_path / ".shard-000001.tar.another-machine.0123456789ab-7.tmp").write_bytes(b"x")
        ticks = iter(range(10**6))
        watch._clock = lambda: float(next(ticks))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shards.looking.clean.time.sleep", lambda seconds: living.say())
            removed = clean(tmp_path, watch)
        assert sorted(removed) == [
            ".shard-000001.tar.another-machine.0123456789ab-7.tmp",
            "claim of shard-000001",
            "note of task 0 on another",
        ]
        assert not note.exists() and note_path(tmp_path, living.note.token).exists()
        assert [path.name for path in (tmp_path / CLAIMS_DIR).iterdir()] == ["shard-000000"]
