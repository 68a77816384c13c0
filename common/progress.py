"""Progress of long work: a bar on a terminal, a log line every so often anywhere else."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 30.0


class Progress:
    """Counts units of work and shows them; use as a context manager."""

    def __init__(self, total: int | None, description: str, unit: str = "it", initial: int = 0) -> None:
        """Say what is counted; nothing is shown before the context is entered.

        Args:
            total: units in all, or None if unknown.
            description: what is being done, e.g. "precompute".
            unit: the unit's name, e.g. "sample".
            initial: units already done by an earlier run.
        """
        self._total, self._description, self._unit = total, description, unit
        self._count = self._initial = self._logged = initial
        self._facts: dict[str, Any] = {}
        self._bar: Any = None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total,
                desc=self._description,
                unit=self._unit,
                initial=self._count,
                dynamic_ncols=True,
            )
        self._started = self._last_line = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._count > self._logged:
            self._log()

    def update(self, n: int = 1, **facts: Any) -> None:
        """Count n more units; facts (loss, rate ...) are shown beside the count."""
        self._count += n
        self._facts.update(facts)
        if self._bar is not None:
            self._bar.update(n)
            if facts:
                self._bar.set_postfix(self._facts, refresh=False)
        elif time.monotonic() - self._last_line >= LOG_INTERVAL_SECONDS:
            self._log()

    def _log(self) -> None:
        self._last_line, self._logged = time.monotonic(), self._count
        rate = (self._count - self._initial) / max(self._last_line - self._started, 1e-9)
        of_total = f"/{self._total}" if self._total is not None else ""
        facts = "".join(f", {name} {value}" for name, value in self._facts.items())
        logger.info("%s: %d%s %s, %.3g/s%s", self._description, self._count, of_total, self._unit, rate, facts)


def format_seconds(seconds: float) -> str:
    """Return e.g. "42 s", "3 min 5 s", "7 h 12 min", "3 d 4 h"."""
    whole = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small} {small_unit}"
    return f"{whole} s"
