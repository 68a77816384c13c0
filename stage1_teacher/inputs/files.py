"""All inputs of a run: annotation files, then prompt files, each in the order given."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from common.errors import DataError
from common.sections import InputsConfig
from stage1_teacher.inputs.annotations import Annotations
from stage1_teacher.inputs.input import Input
from stage1_teacher.inputs.prompts import Prompts

logger = logging.getLogger(__name__)


class Source(Protocol):
    """One file of inputs."""

    def __len__(self) -> int: ...

    def input_id(self, index: int) -> str:
        """Return the index-th input's id, without reading the file."""

    def where(self, index: int) -> str:
        """Name the index-th input for messages."""

    def __getitem__(self, index: int) -> Input:
        """Read the index-th input.

        Raises:
            InputFailure: its values are wrong.
        """


class Inputs:
    """The inputs of several files, one after the other; reading is safe from threads."""

    def __init__(self, sources: Sequence[Source], limit: int | None = None) -> None:
        """Join files.

        Args:
            sources: opened files.
            limit: use the first this many inputs; None for all.
        """
        self._sources = list(sources)
        self._ends = list(accumulate(map(len, sources)))
        total = self._ends[-1] if self._ends else 0
        self._count = total if limit is None else min(limit, total)

    def __len__(self) -> int:
        return self._count

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect_right(self._ends, index)
        source = self._sources[number]
        return source, index - (self._ends[number] - len(source))

    def ids(self) -> list[str]:
        """Return all ids in order; inputs that say the same have the same one."""
        found = [source.input_id(i) for source in self._sources for i in range(len(source))]
        return found[: self._count]

    def where(self, index: int) -> str:
        """Name an input for messages."""
        source, place = self._find(index)
        return source.where(place)

    def __getitem__(self, index: int) -> Input:
        """Read an input.

        Raises:
            InputFailure: its values are wrong.
        """
        source, place = self._find(index)
        return source[place]


def say_which_are_equal(inputs: Inputs, ids: Sequence[str]) -> None:
    """Log how many inputs say the same as an earlier one: they become one record.

    Args:
        inputs: all of them.
        ids: theirs, in order.
    """
    different = len(set(ids))
    if different == len(ids):
        return
    first: dict[str, int] = {}
    later = next(place for place, input_id in enumerate(ids) if first.setdefault(input_id, place) != place)
    logger.warning(
        "%d of %d inputs say the same as an earlier one and become one record with it, first %s, as %s; a prompt"
        " with a `seed` of its own is another",
        len(ids) - different,
        len(ids),
        inputs.where(later),
        inputs.where(first[ids[later]]),
    )


def open_inputs(
    annotations: Sequence[Path],
    prompts: Sequence[Path],
    settings: InputsConfig,
    fonts: Mapping[str, Path],
    limit: int | None = None,
    *,
    measure_images: bool = False,
) -> Inputs:
    """Scan the files.

    Args:
        annotations: AnyWord json files.
        prompts: JSONL files.
        settings: how they are read.
        fonts: configured fonts by name.
        limit: use the first this many inputs.
        measure_images: where images are not read, look up the sizes of those that are there.

    Raises:
        DataError: a file is missing or its structure is wrong, or there is no input at all.
    """
    sources: list[Source] = [
        Annotations(
            path,
            fonts=fonts,
            use_images=settings.use_images,
            frame=settings.frame,
            measure_images=measure_images,
            watermark_threshold=settings.watermark_threshold,
            ignored_fields=settings.ignore_fields,
        )
        for path in annotations
    ]
    sources += [
        Prompts(
            path,
            size=settings.size,
            fonts=fonts,
            use_images=settings.use_images,
            ignored_fields=settings.ignore_fields,
        )
        for path in prompts
    ]
    inputs = Inputs(sources, limit)
    if len(inputs) == 0:
        raise DataError(f"no inputs in {', '.join(str(path) for path in (*annotations, *prompts)) or 'no files'}")
    return inputs
