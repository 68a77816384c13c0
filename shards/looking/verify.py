"""`verify`: everything in a set is looked at, and everything that is wrong is named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from common.errors import DataError, MachineError, reason
from common.faults import disk_fault
from common.progress import Progress
from shards.files.plan import read_plan
from shards.files.sidecar import SidecarHeader
from shards.reading.damage import Damage, verify_shard, whole_shard
from shards.reading.opening import PLANNED_ONLY, find_set
from shards.reading.reader import ShardSet
from shards.reading.store import open_store


class Audit(NamedTuple):
    """What an audit found."""

    shards: ShardSet | None
    """The set; None if none of it can be used."""
    damages: list[str]
    """One line each."""
    unread: list[str]
    """What the disk or the connection did not give: nothing is known of it. One line each."""


def audit(location: str | Path, num_threads: int = 0) -> Audit:
    """Check a set's manifest, unconditional contexts, plan, sidecars and shards.

    A set in work is no damage: shards that are planned and not there yet are not missed, one without its
    sidecar is.

    Args:
        location: a folder or URL.
        num_threads: that hash; 0 for one per core.

    Raises:
        MachineError: the set cannot be reached.
    """
    store = open_store(location)
    try:
        opened = find_set(store, allow_incomplete=True, damage="collect")
    except DataError as error:
        return Audit(None, [str(error)], [])
    shards, unread = ShardSet(store, opened), list(opened.unread)
    found = [line for line in shards.left_out if not line.endswith(PLANNED_ONLY)]
    if "://" not in str(location):
        found += _check_plan(Path(location))
    for damage in verify_set(shards, num_threads):
        (unread if damage.unread else found).append(damage.message)
    return Audit(shards, found, unread)


def verify_set(shards: ShardSet, num_threads: int = 0) -> Iterator[Damage]:
    """Verify every shard of a set, several at a time (hashing releases Python's lock); yields damage in order.

    Args:
        shards: an open set; its manifest, uncond and sidecar headers were checked when it was opened.
        num_threads: 0 for one per core, at most 16.
    """
    workers = num_threads or min(16, os.cpu_count() or 1)
    total, numbers = sum(header.bytes for header in shards.headers), range(len(shards.headers))
    with ThreadPoolExecutor(workers) as pool, Progress(total, "verify", "B") as progress:
        verified = pool.map(lambda number: _verify_number(shards, number), numbers)
        for header, damages in zip(shards.headers, verified, strict=True):
            yield from damages
            progress.update(header.bytes)


def _verify_number(shards: ShardSet, number: int) -> list[Damage]:
    header = shards.headers[number]
    try:
        return verify_shard(shards.shard_path(number), header, shards.table(number))
    except FileNotFoundError:
        return [whole_shard(header.shard, "the file is missing")]
    except OSError as error:
        if fault := disk_fault(error, header.shard):
            return [_unread(header, fault)]
        return [whole_shard(header.shard, f"cannot be read ({reason(error)})")]
    except MachineError as error:
        return [_unread(header, error)]
    except DataError as error:
        return [Damage(shard=header.shard, sample=None, whole=True, message=str(error))]


def _unread(header: SidecarHeader, fault: MachineError) -> Damage:
    return Damage(shard=header.shard, sample=None, whole=True, unread=True, message=str(fault))


def _check_plan(folder: Path) -> list[str]:
    try:
        read_plan(folder)
    except DataError as error:
        return [str(error)]
    return []
