"""What an annotation file says that may be read otherwise than its writer meant: counted, and said once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stage1_teacher.inputs.input import is_number

logger = logging.getLogger(__name__)


class _Noticed:
    """How often, and where first."""

    count, first = 0, ""

    def add(self, where: str) -> None:
        self.first = self.first or where
        self.count += 1


class Notices:
    """Counts over the entries of one file."""

    def __init__(self, reach: float) -> None:
        """Begin to count.

        Args:
            reach: coordinate beyond which a polygon does not fit the image that it is assumed to lie in; infinite
                where nothing is assumed.
        """
        self.left_out = 0
        """Entries with too large a wm_score."""
        self._reach, self._odd_valid, self._outside = reach, _Noticed(), _Noticed()

    def look_at(self, line: dict[str, Any], where: str) -> None:
        """Count one line of an entry that is not left out.

        Args:
            line: as written, its values unchecked.
            where: names it.
        """
        valid, polygon = line.get("valid"), line.get("polygon")
        if valid is not None and not isinstance(valid, bool):
            self._odd_valid.add(f"{where} has {valid!r:.20}")
        if self._reach < float("inf") and isinstance(polygon, list) and valid is not False:
            corners = (corner for corner in polygon if isinstance(corner, list))
            farthest = max((number for corner in corners for number in corner if is_number(number)), default=0)
            if farthest > self._reach:
                self._outside.add(f"{where} reaches to {farthest:g}")

    def lines(self, path: Path, watermark_threshold: float) -> list[tuple[str, str]]:
        """Return what was counted, as lines for the log with their levels.

        Args:
            path: the file's.
            watermark_threshold: beyond which entries were left out.
        """
        found = []
        if self.left_out:
            limit = f"wm_score above inputs.watermark_threshold = {watermark_threshold:g}"
            found.append(("INFO", f"{path}: entries that are left out: {self.left_out}, with a {limit}"))
        if self._odd_valid.count:
            found.append(
                (
                    "WARNING",
                    f"{path}: lines whose `valid` is neither true nor false: {self._odd_valid.count}"
                    f" ({self._odd_valid.first}); they are rendered, only false leaves one out",
                )
            )
        if self._outside.count:
            found.append(
                (
                    "WARNING",
                    f"{path}: lines whose polygon does not fit the image size that is assumed without images:"
                    f" {self._outside.count} ({self._outside.first}, in an image of 512 pixels); give"
                    " inputs.frame = the side of the annotated images",
                )
            )
        return found


def say(lines: Iterable[Sequence[str]]) -> None:
    """Log what `Notices.lines` returned."""
    for level, line in lines:
        logger.log(logging.getLevelNamesMapping()[level], "%s", line)
