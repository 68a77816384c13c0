"""The few figures at the head of the page, and what they say in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stage2_student.evaluation.table import Difference, RunRow, Summary
from stage2_student.report.markup import Markup, tag
from stage2_student.report.words import evaluations, interval, percent, points


def highlights(summary: Summary) -> Markup | None:
    """Return tiles: the best student, the solve it learnt from, as few steps without training, and its price."""
    tiles = [tile for tile in _tiles(summary) if tile is not None]
    return tag("ul", *tiles, class_="tiles") if tiles else None


def _tiles(summary: Summary) -> list[Markup | None]:
    runs = [run for run in summary.runs if run.sen_acc and not run.is_ablation]
    students = [run for run in runs if run.kind == "student"]
    full = full_solve(runs)
    if not students:
        shown = [full] if full else runs[:1]
        return [_score_tile(run.label, run) for run in shown if run]
    best = max(students, key=lambda run: run.sen_acc.value if run.sen_acc else 0)
    same = next((run for run in runs if run.kind == "teacher" and run.steps == best.steps), None)
    return [
        _distance_tile(students, runs),
        _score_tile(best.label, best),
        _score_tile(f"{full.label}: {_relation(best, full)}", full) if full else None,
        _score_tile(f"{same.label}: the same steps, undistilled", same) if same else None,
        _price_tile(summary.differences, best, full) if full else None,
    ]


def _relation(student: RunRow, solve: RunRow) -> str:
    """Say what a teacher's solve is to a student; no bound: a student may be read better than its teacher."""
    learnt = solve.settings.get("rounds_states") and student.settings.get("objective") != "lcm"
    return "what it learnt from" if learnt else "the teacher in full"


def full_solve(runs: Sequence[RunRow]) -> RunRow | None:
    """Return the solve that students learn from, or else the teacher's longest."""
    teachers = [run for run in runs if run.kind == "teacher"]
    recorded = [run for run in teachers if run.settings.get("rounds_states")]
    return max(recorded or teachers, key=lambda run: run.steps, default=None)


def telling_pairs(summary: Summary) -> list[Difference]:
    """Return the differences that answer a question.

    What does a student lose against the solve that it learnt from; what does it gain over the teacher in as few
    steps; what is lost without a part of the teacher.
    """
    runs = summary.runs
    whole = [run for run in runs if run.kind == "teacher" and not run.is_ablation]
    full = full_solve(whole)
    wanted = set()
    for run in runs:
        if run.kind == "student":
            wanted |= {(run.label, other.label) for other in whole if other.steps == run.steps}
            wanted |= {(run.label, full.label)} if full else set()
        elif run.is_ablation:
            grid = run.settings.get("grid")
            wanted |= {(run.label, other.label) for other in whole if other.settings.get("grid") == grid}
    order = [run.label for run in runs]
    pairs = [row for row in summary.differences if (row.run, row.less) in wanted]
    return sorted(pairs, key=lambda row: order.index(row.run))


def _distance_tile(students: Sequence[RunRow], runs: Sequence[RunRow]) -> Markup | None:
    """Show how much nearer to the teacher's own solve the best student is than the teacher in as few steps.

    With guidance or without, whichever is nearer: few steps overshoot with it, so that it alone proves little.
    """
    pairs = []
    for student in students:
        rivals = [run for run in runs if run.kind == "teacher" and run.steps == student.steps]
        if (nearest := min(map(_error, rivals), default=math.inf)) < math.inf and 0 < _error(student) < math.inf:
            teacher = next(run for run in rivals if _error(run) == nearest)
            pairs.append((nearest / _error(student), student, teacher))
    if not pairs:
        return None
    ratio, student, teacher = max(pairs, key=lambda pair: pair[0])
    ours, theirs = _error(student), _error(teacher)
    calls = (evaluations(run.unet_evaluations) for run in (student, teacher))
    return tag(
        "li",
        tag("strong", f"{ratio:.1f} ×"),
        tag("span", f"nearer to the teacher's own solve: {student.label}, against {teacher.label}"),
        tag("small", f"endpoint error {ours:.3f}, not {theirs:.3f}; UNet calls {', not '.join(calls)}"),
        class_="student",
    )


def _error(run: RunRow) -> float:
    return run.endpoint_error.value if run.endpoint_error else math.inf


def _score_tile(label: str, run: RunRow) -> Markup:
    return tag(
        "li",
        tag("strong", percent(run.sen_acc)),
        tag("span", label),
        tag("small", f"95 % interval {interval(run.sen_acc)}"),
        class_=run.kind,
    )


def _price_tile(differences: Sequence[Difference], student: RunRow, full: RunRow) -> Markup:
    pair = next((d for d in differences if (d.run, d.less) == (student.label, full.label)), None)
    faster = full.seconds_per_image / student.seconds_per_image if student.seconds_per_image else 0
    ours, theirs = evaluations(student.unet_evaluations), evaluations(full.unet_evaluations)
    calls = f"{ours} UNet call{'s' * (student.unet_evaluations != 1)} instead of {theirs}"
    return tag(
        "li",
        tag("strong", f"{faster:.1f} ×" if faster else calls),
        tag("span", f"faster: {calls}" if faster else ""),
        tag("small", f"{points(pair.sen_acc)} points of Sen. Acc ({interval(pair.sen_acc)})" if pair else ""),
    )
