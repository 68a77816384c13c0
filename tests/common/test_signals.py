from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import signals
from common.config import PROJECT_ROOT
from common.errors import Stopped
from common.signals import StopFlag


def test_the_first_signal_asks_and_a_later_second_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag() as flag:
        flag.raise_if_requested("nothing")
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.stop_requested
        with pytest.raises(Stopped, match="3 of 4 shards"):
            flag.raise_if_requested("3 of 4 shards are committed")
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes on what its group was sent: the same request
        monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
        with pytest.raises(Stopped, match="second SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", signals.STOPS)
def test_every_signal_that_asks_for_a_stop_does(number: int) -> None:
    with StopFlag() as flag:
        os.kill(os.getpid(), number)
        assert flag.stop_requested


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not flag.stop_requested
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


START = """
import sys, runpy, time
sys.path.insert(0, ".")
class Slow:  # what imports click must wait: a signal meets the process in the middle of its imports
    def find_spec(self, name, path, target=None):
        if name == "click":
            open(sys.argv[1], "w").close()
            for _ in range(6000):
                time.sleep(0.01)
sys.meta_path.insert(0, Slow())
runpy.run_path("pipeline.py", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_during_imports_ends_the_process_at_once_with_75(number: int, tmp_path: Path) -> None:
    _, code, errors = _signal_when_importing([], number, tmp_path)
    assert code == 75, errors
    assert "run the same command again" in errors and "Traceback" not in errors


def test_so_it_does_as_pid_1_of_a_container(tmp_path: Path) -> None:
    isolate = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*isolate, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no permission to make a PID namespace")
    process, code, errors = _signal_when_importing(isolate, signal.SIGTERM, tmp_path)
    assert code == 75, errors
    assert process.args[0] == "unshare"  # type: ignore[index]


def _signal_when_importing(
    isolate: list[str], number: int, folder: Path
) -> tuple[subprocess.Popen[str], int, str]:
    started = folder / "started"
    process = subprocess.Popen(
        [*isolate, sys.executable, "-c", START, str(started), "train"],
        cwd=PROJECT_ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not started.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    receiver = process.pid
    if isolate:  # unshare waits for its child, which is PID 1 in there
        receiver = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(receiver, number)
    _, errors = process.communicate(timeout=30)
    return process, process.returncode, errors
