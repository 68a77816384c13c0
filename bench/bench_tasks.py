"""What a task of a large set costs beside its work: seconds and peak memory of real processes.

    python bench/bench_tasks.py                      300,000 annotations
    python bench/bench_tasks.py --inputs 3000000     a made-up file of 3 GB, several minutes to read once

The annotations are made up, the embedded teacher is real. Rows: the first task, which reads the file and writes
index and plan; a task that works, beside one of a set with a hundred inputs; a task that finds every shard
committed (they hold failures only, so that they are quickly made); `status`. Aims stand beside what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.config import PROJECT_ROOT
from common.scripts import make_parser, run_script
from shards.files.failures import Failure
from shards.files.manifest import read_manifest
from shards.files.plan import read_plan
from shards.writing.writer import ShardWriter

SETTINGS = (
    *("inputs.use_images=false", "inputs.frame=512", "precompute.solver_steps=2", "precompute.batch_size=4"),
    "shards.samples_per_shard=256",
)
ONLY_JOIN = """
import sys, stage1_teacher.precompute as module, pipeline
module._begin = lambda share: (None, None)  # all but the work
pipeline.cli(args=sys.argv[1:])
"""


class Cost(NamedTuple):
    """Of a process, its children included."""

    seconds: float
    cpu_seconds: float
    """What a machine with nothing else to do would take, about."""
    megabytes: float
    """Peak of its resident memory."""


def write_annotations(path: Path, count: int) -> None:
    """Write an annotation file with about a kilobyte an entry, as AnyWord has."""
    line = {"language": "Latin", "valid": True, "rec_score": 0.987654, "pos": 4, "color": [17, 34, 51]}
    with path.open("w") as file:
        file.write('{"data_root": "imgs", "data_list": [')
        for number in range(count):
            lines = [
                line | {"text": f"No {number % 100}", "polygon": [[20, y], [400, y], [400, y + 60], [20, y + 60]]}
                for y in (10, 110, 210, 310)
            ]
            words = " ".join(("a sign beside a road with words on it", "in the evening light") * 3)
            entry = {"img_name": f"{number:09d}.jpg", "caption": f"{words}, {number}", "annotations": lines}
            file.write((", " if number else "") + json.dumps(entry))
        file.write("]}")


def measure(command: list[str], until: Path | None = None) -> Cost:
    """Run a process to its end, or stop it once a file is there."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)
    while until is not None and not until.exists() and process.poll() is None:
        time.sleep(0.1)
    if until is not None:
        process.send_signal(signal.SIGTERM)
    _pid, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != (0 if until is None else 75):
        raise RuntimeError(f"{command} ended with {code}")
    return Cost(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def commit_all(folder: Path) -> None:
    """Commit every shard of a plan, each input as a failure."""
    identity = read_manifest(folder).identity_sha256
    for shard in read_plan(folder).shards():
        with ShardWriter(folder, shard.shard_index, identity_sha256=identity, provenance={}) as writer:
            for place, input_id in enumerate(shard.input_ids, start=shard.first_index):
                writer.fail(Failure(input_id=input_id, sample_index=place, reason="made up", message="no record"))
            writer.commit()


def arguments_of(annotations: Path, out: Path) -> list[str]:
    """Return the arguments of precompute."""
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    named = ["--annotations", str(annotations), "--out", str(out)]
    return ["precompute", "--config", "configs/tiny.toml", *settings, *named]


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure and print."""
    python, few, many = sys.executable, folder / "few.json", folder / "many.json"
    write_annotations(few, 100)
    write_annotations(many, options.inputs)
    size = many.stat().st_size / 1e6
    print(f"{options.inputs:,} annotations, {size:,.0f} MB\n", flush=True)
    big = options.inputs > 10**6

    def row(what: str, cost: Cost, aim: str) -> None:
        times = f"{cost.seconds:7.1f} s {cost.cpu_seconds:7.1f} s CPU"
        print(f"{what:<44} {times} {cost.megabytes:7.0f} MB   {aim}", flush=True)

    row("first task: index and plan", measure([python, "-c", ONLY_JOIN, *arguments_of(many, folder / "set")]), "")
    first = folder / "set" / "shard-000000.json"
    pipeline = [python, "pipeline.py"]
    works = measure([*pipeline, *arguments_of(many, folder / "set")], until=first)
    hundred = measure([*pipeline, *arguments_of(few, folder / "hundred")], until=folder / "hundred" / first.name)
    row("a task that works, until its first shard", works, "at most 100 MB more than")
    row("the same with a hundred inputs", hundred, "")
    commit_all(folder / "set")
    cost = measure([*pipeline, *arguments_of(many, folder / "set")])
    row("a task with nothing to do", cost, "15 s, 600 MB" if big else "3 s, 150 MB")
    shards = read_plan(folder / "set").num_shards
    cost = measure([*pipeline, "status", "--json", "--shards", str(folder / "set")])
    row(f"status of {shards:,} shards", cost, "2 s, 150 MB at 12,000")


def main() -> None:
    """Take the options, and a folder that is gone afterwards."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--inputs", type=int, default=300_000)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        run(options, Path(name))


if __name__ == "__main__":
    run_script(main)
