"""What the benchmark of a GPU measured: rows, kept as they come; tables and aims, made of them at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROWS_FILE, TABLE_FILE = "rows.jsonl", "table.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement, or one comparison of values."""

    part: str
    """That measured it."""
    case: str
    """What was measured; no two rows of a run have the same."""
    rate: float | None = None
    """In `unit`."""
    unit: str = ""
    milliseconds: float | None = None
    """Of a step or call, the median."""
    first_seconds: float | None = None
    """Of its first call, compiling included."""
    of_matmul: float | None = None
    """Arithmetic a second that the plain way needs for this rate, over that of a large matrix product."""
    gib: float | None = None
    """Most GPU memory that was allocated, GiB."""
    baseline: str = ""
    """The case whose rate this one's is divided by."""
    error: float | None = None
    """norm(difference) / norm(expected) of a comparison, or 0 and 1 for equal and different."""
    tolerance: float | None = None
    """What `error` may be at most."""
    note: str = ""
    """What else there is to say; why there is no figure."""

    @property
    def is_wrong(self) -> bool:
        """Whether values differ by more than they may."""
        return self.error is not None and self.tolerance is not None and not self.error <= self.tolerance


def write_row(out: Path, row: Row) -> None:
    """Append a row to the output folder at once, in one write: several processes may."""
    line = json.dumps({key: value for key, value in asdict(row).items() if value not in (None, "")})
    with (out / ROWS_FILE).open("a") as file:
        file.write(line + "\n")


def read_rows(out: Path) -> list[Row]:
    """Read what has been measured so far."""
    path = out / ROWS_FILE
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def ratio(rows: Sequence[Row], case: str, baseline: str) -> float | None:
    """Return the rate of a case over that of another; None if one of them was not measured."""
    rates = {row.case: row.rate for row in rows}
    mine, other = rates.get(case), rates.get(baseline)
    return mine / other if mine and other else None


def tabulate(rows: Sequence[Row], order: Sequence[str]) -> str:
    """Return the tables of all parts in the given order, in Markdown; columns that are empty are left out."""
    return "\n\n".join(
        f"## {part}\n\n{_table([row for row in rows if row.part == part], rows)}"
        for part in order
        if any(row.part == part for row in rows)
    )


def _table(rows: Sequence[Row], everything: Sequence[Row]) -> str:
    cells = [_cells(row, everything) for row in rows]
    columns = [name for name in cells[0] if name == "case" or any(cell[name] for cell in cells)]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cell[name] for name in columns) + " |" for cell in cells)])


def _cells(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    compared = ratio(rows, row.case, row.baseline)
    wrong = " WRONG" if row.is_wrong else ""
    return {
        "case": row.case,
        "rate": "" if row.rate is None else f"{row.rate:.4g} {row.unit}",
        "ms": "" if row.milliseconds is None else f"{row.milliseconds:.4g}",
        "first, s": "" if row.first_seconds is None else f"{row.first_seconds:.3g}",
        "of the product's rate": "" if row.of_matmul is None else f"{row.of_matmul:.3f}",
        "GiB": "" if row.gib is None else f"{row.gib:.1f}",
        "rate over": "" if compared is None else f"{compared:.2f} x {row.baseline}",
        "error": "" if row.error is None else f"{row.error:.1e} (at most {row.tolerance:.0e}){wrong}",
        "note": row.note,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """A figure, and what it is to reach, if anything."""

    what: str
    case: str
    least: float | None = None
    most: float | None = None
    field: str = "rate"
    """The row's figure; its rate is divided by the baseline's."""
    baseline: str = ""

    def received(self, rows: Sequence[Row]) -> float | None:
        """Return the figure; None if it was not measured."""
        assert self.field in {field.name for field in fields(Row)}
        if self.baseline:
            return ratio(rows, self.case, self.baseline)
        found = [row for row in rows if row.case == self.case]
        return getattr(found[0], self.field) if found else None

    @property
    def expected(self) -> str:
        """In words."""
        bounds = {"at least": self.least, "at most": self.most}
        return ", ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)

    def verdict(self, value: float | None) -> str:
        """Return "met" or "missed"; nothing where there is no figure or no bound."""
        if value is None or not self.expected:
            return ""
        met = (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
        return "met" if met else "missed"


def judge(rows: Sequence[Row], aims: Sequence[Aim]) -> str:
    """Return the table of aims, in Markdown."""
    lines = ["| what | aim | measured | |", "| --- | --- | --- | --- |"]
    for aim in aims:
        value = aim.received(rows)
        measured = "not measured" if value is None else f"{value:.3g}"
        lines.append(f"| {aim.what} | {aim.expected} | {measured} | {aim.verdict(value)} |")
    return "\n".join(lines)
