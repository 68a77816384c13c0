"""Both stages at full size on a GPU: as they were and with every improvement, side by side, values checked.

    python bench/bench_gpu.py                       the parts of `quick`, within 4 minutes from a cold start
    python bench/bench_gpu.py all                   every part, within 9 minutes
    python bench/bench_gpu.py step-best profile     some parts, see bench/gpu/parts.py

The weights are made up, which changes no time. Each part runs in a process of its own under a limit of its own and
writes what it measured to OUT/rows.jsonl at once; at the end all of it is in OUT/table.md and printed. Without a
GPU the same code runs on a network as small as it gets (--size small), in this process and without compiling: that
shows that it works, and its figures mean nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.gpu.parts import AIMS, PARTS, QUICK, SECONDS, Part, choose
from bench.gpu.place import FULL, SIZES, SMALL, Place, prepare_place
from bench.gpu.rows import ROWS_FILE, TABLE_FILE, Row, judge, read_rows, tabulate, write_row
from bench.gpu.running import run_parts
from bench.gpu.solving import describe_failure
from common.compiling import CACHE_DIR_VARIABLE
from common.config import PROJECT_ROOT
from common.errors import DataError
from common.machine import describe_machine
from common.scripts import make_parser, run_script

SPARE_GIB = 4.0
"""Of GPU memory, for what each process's CUDA takes."""
COMPILING = 2
"""Parts that compile at once, mostly; they share the cores."""


def measure_here(place: Place, parts: list[Part]) -> None:
    """Run parts one after the other in this process, without limits."""
    for part in parts:
        try:
            part.run(place)
        except Exception as error:
            write_row(place.out, Row(part=part.name, case=f"{part.name}: failed", note=describe_failure(error)))


def measure_beside(place: Place, parts: list[Part], deadline: float, *, cold: bool) -> None:
    """Run parts in processes of their own, without what a run before has compiled if `cold`.

    Where the environment names a cache of compiled code, that one is taken and stays.
    """
    cache = place.out / "compiled"
    if cold:
        shutil.rmtree(cache, ignore_errors=True)
    compilers = str(max(1, (os.cpu_count() or 1) // COMPILING))
    usual = {CACHE_DIR_VARIABLE: str(cache), "TORCHINDUCTOR_COMPILE_THREADS": compilers}
    environment = {**usual, "TOKENIZERS_PARALLELISM": "false", **os.environ}
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0
    common = [sys.executable, str(Path(__file__).resolve()), "--out", str(place.out), "--size", place.size.name]
    run_parts(
        parts,
        place.out,
        lambda name: [*common, "--only", name],
        deadline=deadline,
        gib=gib - SPARE_GIB,
        environment=environment,
    )


def describe_run(place: Place, seconds: float) -> str:
    """Return the head of the table."""
    compiled = "" if place.size.compiles else "; nothing is compiled, the figures mean nothing"
    head = f"{describe_machine()}, torch {torch.__version__}: {place.size.name} size{compiled}; {seconds:.0f} s"
    return f"# bench_gpu\n\n{head}"


def main() -> None:
    """Run the parts and print the tables.

    Raises:
        DataError: values differ by more than they may.
    """
    started = time.monotonic()
    parser = make_parser(__doc__)
    parser.add_argument("parts", nargs="*", default=[QUICK], metavar="PART", help="quick, all, or parts' names")
    parser.add_argument("--out", type=Path, default=PROJECT_ROOT / "build" / "bench-gpu", help="folder")
    usual = FULL if torch.cuda.is_available() else SMALL
    parser.add_argument("--size", choices=list(SIZES), default=usual.name)
    parser.add_argument("--only", help="run one part in this process; for the benchmark itself")
    options = parser.parse_args()
    place = Place(options.out.resolve(), SIZES[options.size])
    if options.only:
        PARTS[options.only].run(place)
        return
    parts, seconds = choose(options.parts)
    prepare_place(place)
    (place.out / ROWS_FILE).unlink(missing_ok=True)
    if place.size is SMALL:
        measure_here(place, parts)
    else:
        measure_beside(place, parts, started + seconds, cold=bool(SECONDS.keys() & options.parts))
    rows = read_rows(place.out)
    table = [describe_run(place, time.monotonic() - started), tabulate(rows, list(PARTS))]
    if place.size is FULL:
        table.append(f"## aims\n\n{judge(rows, AIMS)}")
    text = "\n\n".join(table)
    (place.out / TABLE_FILE).write_text(text + "\n")
    print(text)
    wrong = [row.case for row in rows if row.is_wrong]
    if wrong:
        raise DataError(f"{len(wrong)} values differ by more than they may, the first: {wrong[0]}")


if __name__ == "__main__":
    run_script(main)
