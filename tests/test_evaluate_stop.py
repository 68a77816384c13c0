"""A long evaluation that is asked to stop: a real process, a real signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from click.testing import CliRunner

from pipeline import cli
from tests.stage1_teacher.small_teacher import annotation, write_annotations, write_teacher

ROOT = Path(__file__).parents[1]
COUNT = 6


def test_sigterm_ends_it_with_75_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config = write_teacher(tmp_path)
    write_annotations(tmp_path / "held_out.json", *map(annotation, range(COUNT)))
    command = [
        *("evaluate", "--config", str(config), "--out", str(tmp_path / "out")),
        *("--annotations", str(tmp_path / "held_out.json"), "--teacher", "upstream:25"),
        *("--set", "evaluate.batch_size=1"),
    ]
    results = tmp_path / "out" / "runs" / "teacher-25-steps-upstream-grid" / "results.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "pipeline.py", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while not (results.exists() and results.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "run the same command again" in errors
    before = results.read_bytes()
    done = len(before.splitlines())
    assert 1 <= done < COUNT
    assert not (tmp_path / "out" / "evaluation.json").exists()

    again = CliRunner().invoke(cli, command)
    assert again.exit_code == 0, again.output
    after = results.read_bytes()
    assert after.startswith(before)
    assert len({json.loads(line)["layout_id"] for line in after.splitlines()}) == COUNT == len(after.splitlines())
