"""What is in a set: counts, settings, failures, ranges of every tensor; needs no torch and reads no sample."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from shards.reading.reader import ShardSet
from shards.records.ranges import Ranges, merge_into, rms


def describe_set(shards: ShardSet, failures: dict[str, int]) -> list[str]:
    """Lay out what a set holds as lines of text.

    Args:
        shards: an open set.
        failures: failed inputs by reason (`failures.count_by_reason`).
    """
    size = sum(header.bytes for header in shards.headers)
    failed = sum(failures.values())
    lines = [
        f"samples   {len(shards):,} in {len(shards.headers):,} shards",
        f"bytes     {size:,} ({size / len(shards):,.0f} a sample)",
        f"set hash  {shards.set_hash}",
        f"failed    {failed:,}",
        *(f"          {number:,} {reason}" for reason, number in failures.items()),
    ]
    lines += ["", "settings", *(f"  {key:<32} {value}" for key, value in _leaves(shards.manifest.identity))]
    devices = sorted({json.dumps(header.provenance, sort_keys=True) for header in shards.headers})
    lines += ["", "written by", *(f"  {', '.join(f'{k} {v}' for k, v in json.loads(d).items())}" for d in devices)]
    return [*lines, "", *_table_of_ranges(shards)]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, child in value.items():
            yield from _leaves(child, f"{key}.{name}" if key else name)
    else:
        text = json.dumps(value, ensure_ascii=False)
        yield key, text if len(text) <= 72 else f"{text[:60]}... ({len(text)} characters)"


def _table_of_ranges(shards: ShardSet) -> list[str]:
    ranges: Ranges = {}
    for header in shards.headers:
        merge_into(ranges, header.ranges)
    rows: list[Sequence[str]] = [("tensor", "min", "max", "rms", "values a sample")]
    for name, entry in sorted(ranges.items()):
        rows.append(
            (name, f"{entry[0]:.4g}", f"{entry[1]:.4g}", f"{rms(entry):.4g}", f"{entry[3] / len(shards):,.0f}")
        )
    return [f"{row[0]:<20}" + "".join(f"{cell:>12}" for cell in row[1:4]) + f"{row[4]:>18}" for row in rows]
