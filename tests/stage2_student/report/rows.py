"""Rows of an evaluation's table, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from stage2_student.evaluation.table import RunRow, Summary


def run_row(label: str, kind: str, **more: Any) -> RunRow:
    """Return a run without scores but for those given."""
    scores = dict.fromkeys(("sen_acc", "sen_acc_folded", "ned", "color_acc", "ground"))
    costs = {"unet_evaluations": 4, "writenet_evaluations": 1, "seconds_per_image": 0.2}
    rest = {"folder": label, "steps": 0, "settings": {}, "images": 9, "by_height": (), "by_map": ()}
    return RunRow(label=label, kind=kind, **{**scores, **costs, **rest, **more})


def summary_of(*runs: RunRow) -> Summary:
    """Return a table of runs without differences."""
    return Summary(settings={}, layouts=3, lines=9, palette=(), runs=runs, incomplete=(), differences=())
