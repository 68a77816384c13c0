"""What a task of a large set costs beside its work: seconds and peak memory of real processes.

    python bench/bench_tasks.py                      300,000 annotations
    python bench/bench_tasks.py --inputs 3000000     a made-up file of 3 GB, several minutes to read once

The annotations are made up, the embedded teacher is real. Rows: the first task, which reads the file and writes
index and plan; a task that works, beside one of a set with a hundred inputs; a task that finds every shard
committed (tars that are empty beside sidecars that are not: hashing terabytes again is left out); `status`; a
hundred tasks that start at once. Aims stand beside what was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.config import PROJECT_ROOT
from common.scripts import make_parser, run_script
from shards.files.manifest import read_manifest
from shards.files.names import shard_name, sidecar_name
from shards.files.plan import read_plan
from shards.files.sidecar import Entry, Member, SidecarHeader, encode_sidecar
from shards.records.members import REQUIRED_MEMBERS

SETTINGS = (
    *("inputs.use_images=false", "inputs.frame=512", "precompute.solver_steps=2", "precompute.batch_size=4"),
    "shards.samples_per_shard=256",
)
ONLY_JOIN = """
import sys, stage1_teacher.inputs.index as index, stage1_teacher.precompute as module, pipeline
def told(name, function):
    return lambda *given: [print(name, "written", flush=True), function(*given)][1]
index.store, module._Planned.note = told("index", index.store), told("plan", module._Planned.note)
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


def measure(command: list[str], seconds: float = math.inf) -> Cost:
    """Run a process to its end, or ask it to stop after some time."""
    measured = [sys.executable, "bench/process_cost.py", str(seconds), *command]
    done = subprocess.run(measured, cwd=PROJECT_ROOT, check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    if found["code"] not in ((0, 75) if found["asked"] else (0,)):
        raise RuntimeError(f"{command} ended with {found['code']}")
    return Cost(**found["cost"])


def start_together(command: list[str], count: int, said: Path) -> tuple[float, list[int]]:
    """Start the tasks of a job at once.

    Returns:
        Seconds until the last has ended, and how many of them wrote an index and a plan.
    """
    began = time.perf_counter()
    with said.open("ab") as out:
        numbers = [["--task-index", str(index), "--num-tasks", str(count)] for index in range(count)]
        tasks = [subprocess.Popen([*command, *number], cwd=PROJECT_ROOT, stdout=out) for number in numbers]
        if sum(abs(task.wait()) for task in tasks):
            raise RuntimeError(f"of {count} times {command} some failed")
    return time.perf_counter() - began, [said.read_text().count(f"{name} written") for name in ("index", "plan")]


def commit_all(folder: Path) -> None:
    """Commit every shard of a plan: an empty tar each, beside a sidecar as long as a real one."""
    identity, tar = read_manifest(folder).identity_sha256, bytes(10_240)
    members = tuple(Member(name=name, offset=0, length=10_240, crc32c=2**32 - 1) for name in REQUIRED_MEMBERS)
    for shard in read_plan(folder).shards():
        name, count = shard_name(shard.shard_index), len(shard.input_ids)
        keys = (f"{index:09d}" for index in range(shard.first_index, shard.first_index + count))
        header = SidecarHeader(
            shard=name,
            identity_sha256=identity,
            count=count,
            failed=0,
            bytes=len(tar),
            sha256=hashlib.sha256(tar).hexdigest(),
            ranges={},
            provenance={},
            table_crc32c="",
        )
        (folder / name).write_bytes(tar)
        sidecar = encode_sidecar(header, [Entry(key=key, members=members) for key in keys])
        (folder / sidecar_name(name)).write_bytes(sidecar)


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

    join = [python, "-c", ONLY_JOIN]
    row("first task: index and plan", measure([*join, *arguments_of(many, folder / "set")]), "")
    pipeline = [python, "pipeline.py"]
    works = measure([*pipeline, *arguments_of(many, folder / "set")], options.seconds)
    hundred = measure([*pipeline, *arguments_of(few, folder / "hundred")], options.seconds)
    row(f"a task that works, for {options.seconds:g} s", works, "at most 100 MB more than")
    row("the same with a hundred inputs", hundred, "")
    commit_all(folder / "set")
    cost = measure([*pipeline, *arguments_of(many, folder / "set")])
    row("a task with nothing to do", cost, "15 s, 600 MB" if big else "3 s, 150 MB")
    shards = read_plan(folder / "set").num_shards
    cost = measure([*pipeline, "status", "--json", "--shards", str(folder / "set")])
    row(f"status of {shards:,} shards", cost, "2 s, 150 MB at 12,000")
    command = [*join, *arguments_of(many, folder / "together")]
    seconds, written = start_together(command, options.together, folder / "said")
    what = f"{options.together} tasks at once on a new set, without work"
    print(f"{what:<44} {seconds:7.1f} s; index and plan written {written} times   once each", flush=True)


def main() -> None:
    """Take the options, and a folder that is gone afterwards."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--inputs", type=int, default=300_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the tasks that work may do so")
    parser.add_argument("--together", type=int, default=100, help="tasks that start at once")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        run(options, Path(name))


if __name__ == "__main__":
    run_script(main)
