"""RUN/watch/log.jsonl: what was measured of each checkpoint, a line each, on disk before it is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from common.errors import DataError
from common.files import canonical_json
from common.jsonl import LineWriter, read_lines
from common.toml import describe
from stage2_student.evaluation.metrics import Estimate

LOG_FILE = "log.jsonl"
"""In the folder of a run's watchers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a checkpoint's adapter came to on the held-out records, with 95 % intervals."""

    step: int
    """Optimizer steps of its training."""
    adapter: str
    """SHA-256 over its files, see `checkpoints.Candidate`."""
    folder: str
    """Of its images and single results, in `runs/` beside the log."""
    solver_steps: int
    """M, that it samples with."""
    endpoint_error: Estimate
    """Root mean square of latents against the teacher's own solves of the same noise."""
    endpoint_error_inside: Estimate | None
    """Likewise, of the cells that hold text."""
    endpoint_error_outside: Estimate | None
    """Likewise, of the others."""
    psnr: Estimate | None
    """Of images against those of the teacher's solves, dB."""
    sen_acc: Estimate | None
    """Lines that the judge reads exactly as asked for; None without lines."""
    ned: Estimate | None
    """Normalised edit similarity of the lines; None without lines."""
    color: Estimate | None
    """Colour difference (Delta E*ab) of the lines' text from the same line of the teacher's solve, over the lines
    whose text stands out of its ground in both images; None if none does. Records do not say which colours were
    asked for."""
    seconds_per_image: float
    """The median."""
    time: str
    """When it was measured, UTC."""

    def figures(self) -> dict[str, float]:
        """Return the values alone, by name, those that there are."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        found = {name: value.value for name, value in values if isinstance(value, Estimate)}
        return {**found, "seconds_per_image": self.seconds_per_image}


_MEASURED = TypeAdapter(Measured)


def read_measured(folder: Path) -> list[Measured]:
    """Return what was measured, one of each step, in their order; of a step that was trained again the last.

    Raises:
        DataError: a line is damaged. One that a crash tore is left out.
    """
    found: dict[int, Measured] = {}
    for number, line in enumerate(read_lines(folder / LOG_FILE), 1):
        try:
            measured = _MEASURED.validate_json(line)
        except ValidationError as error:
            raise DataError(
                f"{folder / LOG_FILE}, line {number}: damaged ({describe(error)}); remove the line, and watch"
                " again"
            ) from None
        found[measured.step] = measured
    return [found[step] for step in sorted(found)]


def append_measured(folder: Path, measured: Measured) -> None:
    """Write a line; once this returns, it is on disk."""
    writer = LineWriter[Measured](
        folder / LOG_FILE, encode=lambda line: canonical_json(dataclasses.asdict(line)), durable=True
    )
    with writer:
        writer.append(measured)


def best_of(measured: Sequence[Measured]) -> Measured | None:
    """Return the one of lowest endpoint error, of equals the one of most steps; None if there is none."""
    return min(measured, key=rank, default=None)


def rank(measured: Measured) -> tuple[float, int]:
    """Order by endpoint error, the best first."""
    return measured.endpoint_error.value, -measured.step
