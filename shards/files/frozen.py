"""The set that a run trains on, written down at its start: what comes later does not reach the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from common.files import canonical_json, read_bytes, write_bytes_atomic
from shards.files.names import FROZEN, SCHEMA

Shard = tuple[str, str, int]
"""Name, SHA-256, samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenSet:
    """Exactly which samples a set has."""

    location: str
    """Folder or URL; not part of the hash."""
    identity_sha256: str
    """The manifest's."""
    shards: tuple[Shard, ...]
    """Sorted by name."""
    excluded: dict[str, list[str]]
    """Shard to the keys of its samples that are left out."""
    replaces: tuple[str, ...] = ()
    """Hashes of the sets that the run had before damaged samples were left out of them; not part of the hash."""

    @property
    def set_hash(self) -> str:
        """See `hash_set`."""
        return hash_set(self.identity_sha256, self.shards, self.excluded)


def hash_set(identity_sha256: str, shards: Iterable[Shard], excluded: Mapping[str, Sequence[str]]) -> str:
    """Identify a set of samples: SHA-256 over identity, sorted (shard, SHA-256, count), and what is left out."""
    content: dict[str, object] = {"identity": identity_sha256, "shards": sorted(map(list, shards))}
    if excluded:
        content["excluded"] = {shard: sorted(keys) for shard, keys in excluded.items()}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def write_frozen(run_dir: Path, frozen: FrozenSet) -> Path:
    """Write the set into a run's folder.

    Returns:
        The file.
    """
    values = {
        "schema": SCHEMA,
        "set_hash": frozen.set_hash,
        "location": frozen.location,
        "identity_sha256": frozen.identity_sha256,
        "excluded": frozen.excluded,
        "shards": frozen.shards,
        **({"replaces": frozen.replaces} if frozen.replaces else {}),
    }
    path = run_dir / FROZEN
    write_bytes_atomic(path, canonical_json(values))
    return path


def read_frozen(run_dir: Path) -> FrozenSet:
    """Read the set of a run.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = run_dir / FROZEN
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise DataError(f"{run_dir}: no {FROZEN}; this is not the folder of a training run") from None
    try:
        values = json.loads(data)
        frozen = FrozenSet(
            location=values["location"],
            identity_sha256=values["identity_sha256"],
            shards=tuple((name, sha256, count) for name, sha256, count in values["shards"]),
            excluded=values["excluded"],
            replaces=tuple(values.get("replaces", ())),
        )
        intact = values["schema"] == SCHEMA and frozen.set_hash == values["set_hash"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise DataError(f"{path}: the list of shards is damaged; restore it from a copy")
    return frozen
