"""Many real processes on one set, killed at random moments, until the set is complete.

    python -m tests.stage1_teacher.torture --tasks 8 --kills 60 --inputs 400

Prints what was killed and how much was solved twice, and exits with 1 if the bytes are not one process's, or if
a kill lost more than the shard that was in work.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.config import Config
from stage1_teacher.precompute import precompute
from stage1_teacher.recording.recorder import Recorder
from tests.stage1_teacher.small_teacher import load, write_prompts, write_teacher

FORK = multiprocessing.get_context("fork")


class Report(NamedTuple):
    """What happened."""

    kills: int
    starts: int
    solved: int
    """Inputs that any process began to solve, as often as they were."""


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a set by which it is read, of the manifest the identity alone."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    found.pop(".lock", None)
    identity = json.loads(found.pop("manifest.json"))["identity"]
    return found | {"identity": json.dumps(identity).encode()}


def _work(config: Config, out: Path, prompts: Path, index: int, count: int, solved: Path) -> None:
    torch.set_num_threads(1)
    encode = Recorder.encode

    def counted(self: Recorder, inputs: Any, where: str) -> Any:
        with solved.open("ab") as file:
            file.write(b"x" * len(inputs))
        return encode(self, inputs, where)

    Recorder.encode = counted  # type: ignore[method-assign]
    precompute(config, out, prompts=[prompts], task_index=index, num_tasks=count)
    os._exit(0)


def kill_at_random(
    config: Config, out: Path, prompts: Path, *, tasks: int, kills: int, rng: random.Random
) -> Report:
    """Run tasks side by side, kill one now and then and start it again, until all have ended.

    Args:
        config: of the set.
        out: its folder.
        prompts: its inputs.
        tasks: processes at a time.
        kills: SIGKILLs, each at a moment when a shard is being made.
        rng: chooses who is killed, and when.
    """
    solved = out.with_name(f"{out.name}-solved")
    solved.touch()

    def start(index: int) -> Any:
        task = FORK.Process(target=_work, args=(config, out, prompts, index, tasks, solved))
        task.start()
        return task

    running = {index: start(index) for index in range(tasks)}
    killed, starts, seen = 0, tasks, 0
    while running:
        time.sleep(rng.uniform(0.0, 0.05))
        for index, task in list(running.items()):
            if task.exitcode is None:
                continue
            task.join()
            assert task.exitcode in (0, -signal.SIGKILL), task.exitcode
            del running[index]
            if task.exitcode:
                running[index] = start(index)
                starts += 1
        if running and killed < kills and solved.stat().st_size > seen:  # something was begun since the last one
            seen = solved.stat().st_size
            os.kill(rng.choice(list(running.values())).pid, signal.SIGKILL)
            killed += 1
    return Report(killed, starts, solved.stat().st_size)


def main() -> int:
    """Make a set by one process and by many that are killed, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--inputs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root, size = Path(name), 4
        prompts = write_prompts(root / "prompts.jsonl", options.inputs)
        settings = (f"shards.samples_per_shard={size}", "precompute.solver_steps=2", "precompute.batch_size=2")
        config = load(write_teacher(root), *settings)
        torch.set_num_threads(1)
        precompute(config, root / "one", prompts=[prompts])
        rng = random.Random(options.seed)
        report = kill_at_random(config, root / "many", prompts, tasks=options.tasks, kills=options.kills, rng=rng)
        again = report.solved - options.inputs
        sys.stdout.write(
            f"{report.kills} SIGKILLs among {report.starts} starts of {options.tasks} tasks: {again} of"
            f" {options.inputs} inputs were solved again, at most {size * report.kills} expected\n"
        )
        one, many = contents(root / "one"), contents(root / "many")
        if one != many:
            odd = ", ".join(sorted(name for name in {*one, *many} if one.get(name) != many.get(name)))
            sys.stdout.write(f"BROKEN PROMISE: other bytes than one process's in {odd}\n")
            return 1
        return int(again > size * report.kills)


if __name__ == "__main__":
    raise SystemExit(main())
