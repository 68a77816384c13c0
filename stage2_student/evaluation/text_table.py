"""The table of an evaluation as plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stage2_student.evaluation.metrics import Estimate
from stage2_student.evaluation.table import RunRow, Summary

EMPTY = "-"
"""Of a run that has no such figure."""
_Column = tuple[str, Callable[[RunRow], str]]


def format_table(summary: Summary) -> str:
    """Lay the runs out, intervals in brackets; distances from the teacher's own solve where any run has one."""
    rows = table_cells(summary)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if any(run.kind == "truth" and run.kid is not None for run in summary.runs):
        lines.append("KID of the true images: between two random halves of them, what chance makes of so many")
    lines += [f"not complete, left out: {label}" for label in summary.incomplete]
    return "\n".join(line.rstrip() for line in lines)


def table_cells(summary: Summary) -> list[tuple[str, ...]]:
    """Return the table's cells, its head first, for whoever lays them out otherwise."""
    columns: list[_Column] = [("run", lambda run: run.label), *_columns(summary.runs)]
    rows = [tuple(name for name, _ in columns)]
    return rows + [tuple(cell(run) for _, cell in columns) for run in summary.runs]


def _columns(runs: Sequence[RunRow]) -> list[_Column]:
    distances: list[_Column] = [
        ("error", lambda run: _with_interval(run.endpoint_error)),
        ("in boxes", lambda run: _figure(run.endpoint_error_inside, 3)),
        ("outside", lambda run: _figure(run.endpoint_error_outside, 3)),
        ("PSNR", lambda run: _figure(run.psnr, 1)),
    ]
    kids: list[_Column] = [("KID", lambda run: _with_interval(run.kid))]
    return [
        *(distances if any(run.endpoint_error for run in runs) else []),
        ("Sen. Acc", lambda run: _with_interval(run.sen_acc)),
        ("NED", lambda run: _with_interval(run.ned)),
        ("colour", lambda run: _with_interval(run.color_acc)),
        ("ground ΔE", lambda run: _figure(run.ground, 1)),
        *(kids if any(run.kid for run in runs) else []),
        ("UNet", lambda run: f"{run.unet_evaluations:g}"),
        ("WriteNet", lambda run: f"{run.writenet_evaluations:g}"),
        ("s/image", lambda run: f"{run.seconds_per_image:.3g}"),
    ]


def _figure(estimate: Estimate | None, digits: int) -> str:
    return EMPTY if estimate is None else f"{estimate.value:.{digits}f}"


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return EMPTY
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
