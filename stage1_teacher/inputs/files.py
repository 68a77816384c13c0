"""All inputs of a run: annotation files, then prompt files, each in the order given."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.errors import DataError
from common.sections import InputsConfig
from stage1_teacher.inputs.annotations import Annotations
from stage1_teacher.inputs.index import InputIndex
from stage1_teacher.inputs.input import Input
from stage1_teacher.inputs.opening import open_file
from stage1_teacher.inputs.prompts import Prompts
from stage1_teacher.inputs.table import Place, StoredTable, first_of_equals

logger = logging.getLogger(__name__)


class Source(Protocol):
    """One file of inputs."""

    @property
    def table(self) -> Place:
        """Where the inputs lie in the file."""

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

    def digests(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return all ids in order, (inputs, 16) bytes; inputs that say the same have the same one."""
        found = [source.table.digests() for source in self._sources]
        return np.concatenate(found)[: self._count] if len(found) > 1 else found[0][: self._count]

    def find(self, input_id: str) -> int | None:
        """Return the first input with an id, None if there is none; reads little of the tables and no file."""
        try:
            digest = bytes.fromhex(input_id)
        except ValueError:
            return None
        for source, end in zip(self._sources, self._ends, strict=True):
            row = source.table.find(digest)
            if row is not None:
                index = end - len(source) + row
                return index if index < self._count else None
        return None

    @property
    def names(self) -> list[str]:
        """Of the stored tables, which change with the files; none for one that is only in memory."""
        return [table.path.name for s in self._sources if isinstance(table := s.table, StoredTable)]

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


def say_which_are_equal(inputs: Inputs, digests: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Log how many inputs say the same as an earlier one: they become one record.

    Args:
        inputs: all of them.
        digests: their ids, in order, (inputs, 16) bytes.
    """
    again = np.flatnonzero(~first_of_equals(digests))
    if not len(again):
        return
    later = int(again[0])
    earlier = int(np.flatnonzero((digests == digests[later]).all(axis=1))[0])
    logger.warning(
        "%d of %d inputs say the same as an earlier one and become one record with it, first %s, as %s; a prompt"
        " with a `seed` of its own is another",
        len(again),
        len(digests),
        inputs.where(later),
        inputs.where(earlier),
    )


def require_files(*paths: Path) -> None:
    """Refuse input files that are not there, before anything is made for them.

    Raises:
        DataError: one is missing, or cannot be read.
    """
    for path in paths:
        open_file(path).close()


def open_inputs(
    annotations: Sequence[Path],
    prompts: Sequence[Path],
    settings: InputsConfig,
    fonts: Mapping[str, Path],
    limit: int | None = None,
    *,
    measure_images: bool = False,
    index: InputIndex | None = None,
) -> Inputs:
    """Scan the files, or look where an index says that their inputs lie.

    Args:
        annotations: AnyWord json files.
        prompts: JSONL files.
        settings: how they are read.
        fonts: configured fonts by name.
        limit: use the first this many inputs; no more is read than they need.
        measure_images: where images are not read, look up the sizes of those that are there.
        index: of a set's input files; None reads each file whole.

    Raises:
        DataError: a file is missing or its structure is wrong, or there is no input at all.
    """
    sources: list[Source] = []

    def left() -> int | None:
        return None if limit is None else limit - sum(map(len, sources))

    for path in _while_any(annotations, left):
        sources.append(
            Annotations(
                path,
                fonts=fonts,
                use_images=settings.use_images,
                frame=settings.frame,
                measure_images=measure_images,
                watermark_threshold=settings.watermark_threshold,
                ignored_fields=settings.ignore_fields,
                limit=left(),
                index=index,
            )
        )
    for path in _while_any(prompts, left):
        sources.append(
            Prompts(
                path,
                size=settings.size,
                fonts=fonts,
                use_images=settings.use_images,
                ignored_fields=settings.ignore_fields,
                limit=left(),
                index=index,
            )
        )
    inputs = Inputs(sources, limit)
    if len(inputs) == 0:
        raise DataError(f"no inputs in {', '.join(str(path) for path in (*annotations, *prompts)) or 'no files'}")
    return inputs


def _while_any(paths: Sequence[Path], left: Callable[[], int | None]) -> Iterator[Path]:
    """Yield files for as long as inputs are wanted."""
    for path in paths:
        more = left()
        if more is None or more > 0:
            yield path
