from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from common.overlap import Behind


@pytest.fixture(params=[True, False], ids=["threaded", "at once"])
def threaded(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_pieces_are_done_in_order_and_all_of_them(threaded: bool) -> None:
    done: list[int] = []
    with Behind("work", threaded=threaded) as behind:
        for number in range(20):
            behind.do(partial(done.append, number))
    assert done == list(range(20))


def test_a_thread_works_while_the_caller_goes_on_and_at_once_does_not() -> None:
    def where() -> str:
        return threading.current_thread().name

    go = threading.Event()
    with Behind("work", threaded=True) as behind:
        waits = behind.do(lambda: go.wait(10))
        named = behind.do(where)
        assert not waits.done()  # and yet we are here
        go.set()
        assert waits.result() and named.result().startswith("work")
    with Behind("work", threaded=False) as behind:
        assert behind.do(where).result() == where()


def test_no_more_pieces_wait_than_allowed() -> None:
    go, given = threading.Event(), []

    def give() -> None:
        with Behind("work", threaded=True, most_waiting=3) as behind:
            for number in range(6):
                behind.do(lambda: go.wait(10))
                given.append(number)

    giver = threading.Thread(target=give)
    giver.start()
    deadline = time.monotonic() + 5
    while len(given) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert given == [0, 1, 2]
    go.set()
    giver.join(10)
    assert given == list(range(6))


def test_after_an_error_no_further_piece_begins_and_the_caller_gets_it(threaded: bool) -> None:
    done: list[int] = []
    failing = threading.Event()

    def fail() -> None:
        failing.wait(10)
        raise ValueError("the disk is full")

    with (
        pytest.raises(ValueError, match="the disk is full"),
        Behind("work", threaded=threaded, most_waiting=100) as behind,
    ):
        if not threaded:
            failing.set()
        behind.do(partial(done.append, 0))
        behind.do(fail)  # at once: raises here
        for number in range(1, 20):  # all of them wait behind the one that fails
            behind.do(partial(done.append, number))
        failing.set()
        behind.finish()
    assert done == [0]
    with pytest.raises(ValueError, match="the disk is full"):
        behind.do(partial(done.append, 20))
    assert done == [0]


def test_an_error_of_the_last_piece_is_raised_at_the_end_of_the_context() -> None:
    def fail() -> None:
        time.sleep(0.05)
        raise ValueError("late")

    with pytest.raises(ValueError, match="late"), Behind("work", threaded=True) as behind:
        behind.do(fail)


def test_an_error_of_the_caller_drops_what_has_not_begun_and_waits_for_what_has() -> None:
    done: list[str] = []
    begun = threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.1)
        done.append("slow")

    with pytest.raises(KeyError), Behind("work", threaded=True) as behind:
        behind.do(slow)
        behind.do(partial(done.append, "never"))
        begun.wait(10)
        raise KeyError
    assert done == ["slow"]


def test_an_error_beside_the_callers_own_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    failed = threading.Event()

    def fail() -> None:
        try:
            raise ValueError("the disk is full")
        finally:
            failed.set()

    with pytest.raises(KeyError), Behind("write", threaded=True) as behind:
        behind.do(fail)
        failed.wait(10)
        raise KeyError
    assert "write: failed too: the disk is full" in caplog.text


def test_results_come_in_order_and_one_piece_ahead_of_the_caller() -> None:
    begun: list[int] = []

    def piece(number: int) -> int:
        begun.append(number)
        return number

    seen = []
    with Behind("work", threaded=True, most_waiting=2) as behind:
        for result in behind.ahead(partial(piece, number) for number in range(5)):
            deadline = time.monotonic() + 5
            while len(begun) < min(result + 2, 5) and time.monotonic() < deadline:
                time.sleep(0.005)
            seen.append((result, list(begun)))
    assert seen == [(n, list(range(min(n + 2, 5)))) for n in range(5)]
    begun.clear()
    with Behind("work", threaded=False) as behind:
        assert [(n, list(begun)) for n in behind.ahead(partial(piece, number) for number in range(3))] == [
            (0, [0]), (1, [0, 1]), (2, [0, 1, 2])
        ]  # fmt: skip


def test_an_error_ahead_reaches_the_caller_that_asks_for_a_later_result() -> None:
    def piece(number: int) -> int:
        if number == 1:
            raise ValueError("one")
        return number

    seen = []
    with pytest.raises(ValueError, match="one"), Behind("work", threaded=True) as behind:
        seen += list(behind.ahead((partial(piece, number) for number in range(4)), count=3))
    assert seen in ([], [0])


def test_while_it_is_paused_no_piece_begins_and_the_one_in_work_has_ended() -> None:
    trace: list[str] = []
    begun = threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.05)
        trace.append("slow")

    with Behind("work", threaded=True) as behind:
        behind.do(slow)
        begun.wait(10)
        with behind.paused():
            behind.do(partial(trace.append, "next"))
            time.sleep(0.05)
            trace.append("paused")
    assert trace == ["slow", "paused", "next"]


def test_each_piece_runs_in_its_context(threaded: bool) -> None:
    trace: list[str] = []

    @contextmanager
    def within() -> Iterator[None]:
        trace.append("in")
        yield
        trace.append("out")

    with Behind("work", threaded=threaded, within=within) as behind:
        for name in "ab":
            behind.do(partial(trace.append, name))
    assert trace == ["in", "a", "out", "in", "b", "out"]
