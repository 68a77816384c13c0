"""Parts in processes of their own: limits, order, and what is said of those that do not end well."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.rows import read_rows
from bench.gpu.running import run_parts


@dataclass(frozen=True)
class Piece:
    name: str
    code: str
    seconds: float = 20.0
    gib: float = 1.0


def run(out: Path, pieces: list[Piece], deadline: float = 30.0, gib: float = 10.0) -> dict[str, str]:
    code = {piece.name: piece.code for piece in pieces}
    environment = {**os.environ, "OUT": str(out)}
    run_parts(
        pieces,
        out,
        lambda name: [sys.executable, "-S", "-c", f"import os, time\nout = os.environ['OUT']\n{code[name]}"],
        deadline=time.monotonic() + deadline,
        gib=gib,
        environment=environment,
    )
    return {row.case: row.note for row in read_rows(out)}


def times(out: Path, name: str) -> tuple[float, float]:
    begun, ended = (out / name).read_text().split()
    return float(begun), float(ended)


def is_dead(pid: int) -> bool:
    """Tell whether a process has ended, though perhaps nobody has asked for its exit code yet."""
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def note_times(name: str, seconds: float) -> str:
    return (
        f"begun = time.monotonic(); time.sleep({seconds})\n"
        f"open(out + '/{name}', 'w').write(f'{{begun}} {{time.monotonic()}}')"
    )


def test_parts_run_side_by_side_as_far_as_they_fit(tmp_path: Path) -> None:
    pieces = [
        Piece("large", note_times("large", 0.4), gib=8),
        Piece("second", note_times("second", 0.1), gib=8),
        Piece("small", note_times("small", 0.1), gib=2),
    ]
    assert run(tmp_path, pieces) == {}
    large, second, small = (times(tmp_path, piece.name) for piece in pieces)
    assert small[0] < large[1] <= second[0]  # the small one fits beside the large one, the second does not


def test_a_part_that_takes_too_long_is_ended_with_its_children_and_the_others_run(tmp_path: Path) -> None:
    child = (
        "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    note = "open(out + '/pid', 'w').write(str(child.pid))\ntime.sleep(60)"
    began = time.monotonic()
    found = run(tmp_path, [Piece("slow", child + note, seconds=1.0), Piece("next", note_times("next", 0))], gib=1)
    assert found == {"slow: ended": "it took longer than its 1 s"}
    assert time.monotonic() - began < 15 and (tmp_path / "next").exists()
    assert is_dead(int((tmp_path / "pid").read_text()))


def test_a_part_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    found = run(tmp_path, [Piece("bad", "print('why'); raise SystemExit(3)")])
    assert found == {"bad: failed": "exit code 3, see logs/bad.log"}
    assert (tmp_path / "logs" / "bad.log").read_text() == "why\n"


def test_at_the_deadline_what_runs_is_ended_and_what_waits_is_said_so(tmp_path: Path) -> None:
    pieces = [Piece("long", "time.sleep(60)"), Piece("waiting", "time.sleep(60)", gib=10)]
    began = time.monotonic()
    found = run(tmp_path, pieces, deadline=0.5)
    assert time.monotonic() - began < 10
    assert found == {
        "long: ended": "the run's time was up",
        "waiting: not begun": "the run's time was up",
    }
