"""Reading a set by index: every byte that becomes a record is checked before it is used."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.files.frozen import FrozenSet, read_frozen, write_frozen
from shards.files.manifest import Manifest
from shards.files.sidecar import Entry, SidecarHeader
from shards.reading.open_shard import OpenShard, read_table
from shards.reading.opening import OnDamage, OpenedSet, find_set, select_frozen
from shards.reading.store import Store, open_store
from shards.records.codec import decode_arrays, decode_record, decode_uncond
from shards.records.members import MEMBERS
from shards.records.tensor_file import Array

if TYPE_CHECKING:
    from common.anytext2.conditioning import Uncond
    from shards.records.record import Record

_OPEN_SHARDS = 64
"""Shards kept open, with their tables, per process."""


class ShardSet:
    """The committed samples of a set, by index.

    Cheap to open however large the set, safe to hand to worker processes (forked or spawned).

    Example:
        shards = ShardSet.open("runs/shards")
        record = shards[1234]
    """

    def __init__(self, store: Store, opened: OpenedSet) -> None:
        """Use `open` or `open_frozen`."""
        self._store = store
        self._opened = opened
        self._ends = np.cumsum([opened.count(header) for header in opened.headers], dtype=np.int64)
        self._shards: OrderedDict[int, OpenShard] = OrderedDict()
        self._process = os.getpid()

    @staticmethod
    def open(
        location: str | Path,
        *,
        allow_incomplete: bool = False,
        exclude_damaged: bool = False,
    ) -> ShardSet:
        """Open all committed shards of a set.

        Args:
            location: a folder, or an fsspec URL such as s3://bucket/set (read through `remote`'s cache).
            allow_incomplete: take what is committed although the plan has more.
            exclude_damaged: verify everything first, and leave out what is damaged (under another set_hash).

        Raises:
            DataError: no set there, nothing committed, shards missing, or a file damaged or from another set.
        """
        store = open_store(location)
        damage: OnDamage = "exclude" if exclude_damaged else "raise"
        return ShardSet(store, find_set(store, allow_incomplete=allow_incomplete, damage=damage))

    @staticmethod
    def open_frozen(
        run_dir: Path, location: str | Path | None = None, *, exclude_damaged: bool = False
    ) -> ShardSet:
        """Open the set that a run froze; shards added since are not in it.

        Args:
            run_dir: the run's folder.
            location: where the set is now, if it moved.
            exclude_damaged: verify everything first, and leave out what is damaged or missing now. If that is
                something new, the set has another set_hash and `replaces` the one before.

        Raises:
            DataError: a shard of the frozen set is missing or was rewritten with other content.
        """
        frozen = read_frozen(run_dir)
        store = open_store(frozen.location if location is None else location)
        return ShardSet(store, select_frozen(store, frozen, exclude_damaged=exclude_damaged))

    def freeze(self, run_dir: Path) -> Path:
        """Write down exactly this set in a run's folder, for `open_frozen`.

        Returns:
            The file written.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        frozen = FrozenSet(
            location=self._store.location,
            identity_sha256=self.manifest.identity_sha256,
            shards=tuple((h.shard, h.sha256, h.count) for h in self.headers),
            excluded=self.excluded,
            replaces=self.replaces,
        )
        return write_frozen(run_dir, frozen)

    @property
    def manifest(self) -> Manifest:
        """Identity and provenance of the set."""
        return self._opened.manifest

    @property
    def uncond(self) -> Uncond:
        """The unconditional contexts."""
        return decode_uncond(self._opened.uncond, "uncond.safetensors")

    @property
    def headers(self) -> Sequence[SidecarHeader]:
        """Of every shard, by name."""
        return self._opened.headers

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of every shard that are in the set."""
        return tuple(int(count) for count in np.diff(self._ends, prepend=0))

    @property
    def excluded(self) -> dict[str, list[str]]:
        """Shard to the keys of its samples that are left out as damaged; whole shards are in `left_out`."""
        return self._opened.excluded

    @property
    def left_out(self) -> Sequence[str]:
        """One line for each damage that made `exclude_damaged` leave something out."""
        return self._opened.left_out

    @property
    def set_hash(self) -> str:
        """Identifies exactly these samples, hence their order in training."""
        return self._opened.set_hash

    @property
    def replaces(self) -> tuple[str, ...]:
        """Hashes of the sets that the run had before something was left out of them, oldest first."""
        return self._opened.replaces

    @property
    def has_predictions(self) -> bool:
        """Whether records hold x0_cond and x0_uncond."""
        return any("x0_cond" in header.ranges for header in self.headers)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Record:
        return self.record(index)

    def record(self, index: int, members: Sequence[str] = MEMBERS) -> Record:
        """Read one record.

        Args:
            index: 0 to len - 1.
            members: what to read; all but `x0.safetensors` are needed for a record.

        Raises:
            DataError: a member is damaged; the message names shard, sample and member.
        """
        shard, entry = self._find(index)
        return decode_record(shard.read(entry, members), f"{shard.header.shard}, sample {entry.key}")

    def arrays(self, index: int, members: Sequence[str]) -> dict[str, Array]:
        """Read only the tensors of some members, as read-only arrays by field name; see `record`."""
        shard, entry = self._find(index)
        return decode_arrays(shard.read(entry, members), f"{shard.header.shard}, sample {entry.key}")

    def read_members(self, index: int, members: Sequence[str]) -> dict[str, bytes]:
        """Read the bytes of some members, checked but not decoded; see `record`."""
        shard, entry = self._find(index)
        return shard.read(entry, members)

    def key(self, index: int) -> str:
        """Return a sample's webdataset key."""
        return self._find(index)[1].key

    def shard_path(self, shard_number: int) -> Path:
        """Return the path of a shard (by its place in `headers`) on this machine."""
        return self._store.shard_path(self.headers[shard_number])

    def prefetch(self, shard_numbers: Sequence[int]) -> None:
        """Start to bring shards (by their place in `headers`) to this machine."""
        self._store.prefetch([self.headers[number] for number in shard_numbers])

    def table(self, shard_number: int) -> list[Entry]:
        """Read a shard's table of samples, damaged ones included.

        Raises:
            DataError: the sidecar is damaged, or not the one that was there when the set was opened.
        """
        return read_table(self._store, self.headers[shard_number])

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": self._store, "_opened": self._opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_store"], state["_opened"])  # type: ignore[misc]

    def _find(self, index: int) -> tuple[OpenShard, Entry]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a set of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        shard = self._shard(number)
        return shard, shard.entries[index - first]

    def _shard(self, number: int) -> OpenShard:
        if (
            self._process != os.getpid()
        ):  # a forked worker: file descriptors are shared with the parent, leave them
            self._shards, self._process = OrderedDict(), os.getpid()
        if number not in self._shards:
            header = self.headers[number]
            entries = read_table(self._store, header)
            left_out = set(self.excluded.get(header.shard, ()))
            kept = [entry for entry in entries if entry.key not in left_out]
            self._shards[number] = OpenShard(self._store, header, kept)
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return self._shards[number]
