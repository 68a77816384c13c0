"""Inputs that failed, with the reason: one JSON line each, one file per shard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import DataError
from common.files import canonical_json, read_bytes
from shards.files.names import FAILURES_DIR, failures_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An input that became no record."""

    input_id: str
    sample_index: int
    """The input's index in the plan; no sample has this key."""
    reason: str
    """Short and countable, e.g. "image missing" or "polygon outside image"."""
    message: str
    """One line: what, where, received, expected."""


def encode_failures(failures: Iterable[Failure]) -> bytes:
    """Serialise in order of index; equal failures give equal bytes."""
    ordered = sorted(failures, key=lambda failure: failure.sample_index)
    return b"".join(canonical_json(asdict(failure)) for failure in ordered)


def read_failures(folder: Path) -> Iterator[Failure]:
    """Yield the failures of all committed or running shards of a set, in order of shard.

    Raises:
        DataError: a line is damaged; the message names file and line.
    """
    for path in sorted((folder / FAILURES_DIR).glob("shard-*.jsonl")):
        yield from _read_file(path)


def count_failures_of(folder: Path, shard: str, reason: str) -> int:
    """Count one shard's failures of a reason."""
    path = folder / failures_name(shard)
    return read_bytes(path).count(canonical_json({"reason": reason})[1:-2]) if path.exists() else 0


def _read_file(path: Path) -> Iterator[Failure]:
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            yield Failure(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not a failure record ({error})") from None


def count_by_reason(failures: Iterable[Failure]) -> dict[str, int]:
    """Count failures by reason, most frequent first."""
    return dict(Counter(failure.reason for failure in failures).most_common())
