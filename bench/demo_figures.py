"""Put the demo's picture and figures into the README and docs/results.md, between the marks that they have there.

python bench/demo_figures.py --demo demo
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from stage2_student.evaluation.invocation import read_invocations  # noqa: E402
from stage2_student.evaluation.metrics import Estimate  # noqa: E402
from stage2_student.evaluation.summary import summarise  # noqa: E402
from stage2_student.evaluation.table import RunRow, Summary  # noqa: E402

BEGIN, END = "<!-- written by make figures -->", "<!-- end of what make figures wrote -->"
PICTURE = "![Layouts, the teacher in 40 steps, then teacher and student in 1 step and in 4](docs/comparison.png)"
SHOWN = (
    ("teacher", 40, False),
    *(
        (kind, steps, unguided)
        for steps in (1, 4)
        for kind, unguided in (("teacher", False), ("teacher", True), ("student", False))
    ),
)
"""Kind and steps of the README's rows, and whether it is the teacher without guidance."""


def put(path: Path, text: str) -> None:
    """Replace what stands between the marks of a file.

    Raises:
        SystemExit: it has none.
    """
    old = path.read_text()
    new, count = re.subn(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{text}\n{END}", old, flags=re.DOTALL)
    if count != 1:
        sys.exit(f"{path}: {count} places between {BEGIN} and {END}, expected one")
    path.write_text(new)


def for_readme(summary: Summary) -> str:
    """Return the README's sentence, picture and table.

    Raises:
        SystemExit: a run is missing.
    """
    runs = {(run.kind, run.steps, run.is_unguided): run for run in summary.runs}
    if missing := [key for key in SHOWN if key not in runs or not runs[key].endpoint_error]:
        sys.exit(f"the evaluation has no measured run of {missing}; run the demo whole")
    full, teacher, unguided, student = (runs[key] for key in SHOWN[:4])
    sentence = (
        f"**One UNet call instead of {full.unet_evaluations:g}, {_milliseconds(student)} ms an image instead of"
        f" {_milliseconds(full)}, and nearer to the teacher's own images than the teacher in one step:"
        f" endpoint error {_number(student.endpoint_error, 2)} instead of {_number(teacher.endpoint_error, 2)}, or"
        f" {_number(unguided.endpoint_error, 2)} without its guidance.**"
    )
    head = ("", "UNet calls", "ms an image", "endpoint error", "PSNR, dB", "Sen. Acc", "colours")
    rows = [
        (
            _short(run, full),
            f"{run.unet_evaluations:g}",
            _milliseconds(run),
            _number(run.endpoint_error, 3),
            _number(run.psnr, 1),
            _number(run.sen_acc, 2),
            _number(run.color_acc, 2),
        )
        for run in (runs[key] for key in SHOWN)
    ]
    return f"{sentence}\n\n{PICTURE}\n\n{_table(head, rows)}"


def for_results(summary: Summary, machine: str) -> str:
    """Return the table of docs/results.md, with intervals."""
    head = ("run", "endpoint error", "inside boxes", "outside", "PSNR, dB", "Sen. Acc", "colour", "ground ΔE")
    rows = [
        (
            run.label,
            *(_interval(value, 3) for value in (run.endpoint_error, run.endpoint_error_inside)),
            *(_interval(run.endpoint_error_outside, 3), _interval(run.psnr, 1)),
            *(_interval(run.sen_acc, 3), _interval(run.color_acc, 3), _number(run.ground, 1)),
            f"{run.unet_evaluations:g}",
            f"{run.writenet_evaluations:g}",
            _milliseconds(run),
        )
        for run in summary.runs
    ]
    count = f"{summary.lines} lines of {summary.layouts} held-out layouts, {machine}."
    return f"{count}\n\n{_table((*head, 'UNet', 'WriteNet', 'ms/image'), rows)}"


def _short(run: RunRow, full: RunRow) -> str:
    label = run.label.replace(" (trailing grid, no guidance)", ", no guidance")
    label = label.removesuffix(" (trailing grid)").removesuffix(" (as recorded)")
    return f"{label}: the solve itself" if run is full else f"**{label}**" if run.kind == "student" else label


def _number(found: Estimate | None, digits: int) -> str:
    return "" if found is None else f"{found.value:.{digits}f}"


def _interval(found: Estimate | None, digits: int) -> str:
    if found is None:
        return ""
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _milliseconds(run: RunRow) -> str:
    return f"{1000 * run.seconds_per_image:.0f}" if run.seconds_per_image else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="folder of a whole demo")
    demo: Path = parser.parse_args().demo
    summary = summarise(demo / "evaluation")
    last = read_invocations(demo / "evaluation")[-1]
    machine = f"measured {last['time'][:10]} on {last['machine']}"
    put(ROOT / "README.md", for_readme(summary))
    put(ROOT / "docs" / "results.md", for_results(summary, machine))
    shutil.copyfile(demo / "comparison.png", ROOT / "docs" / "comparison.png")
    print("README.md, docs/results.md and docs/comparison.png have the demo's picture and figures; look at them")


if __name__ == "__main__":
    main()
