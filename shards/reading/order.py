"""The order of samples: in an epoch a pure function of (set_hash, seed, epoch), and cut into the ranks' batches.

Shards are permuted, every `window_shards` of them form a window, and the samples of a window are permuted. So
each sample comes once an epoch, any two samples of a window are equally likely to be neighbours, and no more
than a window of shards need be at hand at a time. Nothing is drawn in sequence: the order at any position is
computed directly.

Permutations sort the raw output of Philox, whose bits numpy guarantees (how `Generator.permutation` uses them
it does not), keyed by a SHA-256 of what the permutation is for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Place = tuple[int, int]
"""(epoch, position in its order)."""
Sample = tuple[int, int]
"""(epoch, index in the set)."""


class EpochOrder:
    """The order of one epoch."""

    def __init__(self, counts: Sequence[int], *, set_hash: str, seed: int, epoch: int, window_shards: int) -> None:
        """Permute the shards; samples are permuted when their window is asked for.

        Args:
            counts: samples of each shard, in the set's order.
            set_hash: the set's.
            seed: chosen by the user.
            epoch: 0 or more.
            window_shards: W, shards shuffled together; a set of no more shards is shuffled whole.
        """
        if window_shards < 1 or epoch < 0:
            raise ValueError(f"window_shards {window_shards}, epoch {epoch}: expected at least 1 and at least 0")
        self._key = f"{set_hash}/{seed}/{epoch}"
        sizes = np.asarray(counts, np.int64)
        self._firsts = np.cumsum(sizes) - sizes  # (num_shards,) index of each shard's first sample
        self._sizes = sizes
        self._shards = permutation(len(sizes), f"{self._key}/shards")
        self._window_shards = window_shards
        ends = np.cumsum(sizes[self._shards])  # positions at which the permuted shards end
        last_shards = np.minimum(np.arange(0, len(sizes), window_shards) + window_shards, len(sizes)) - 1
        self._window_ends = ends[last_shards]  # (num_windows,)
        self._cached: tuple[int, Indices] | None = None

    def __len__(self) -> int:
        """Samples in the epoch."""
        return int(self._window_ends[-1]) if len(self._window_ends) else 0

    def window_at(self, position: int) -> int:
        """Return the number of the window that holds a position."""
        return int(np.searchsorted(self._window_ends, position, side="right"))

    def window_shard_numbers(self, window: int) -> list[int]:
        """Return the shards of a window, by their place in the set; none past the last window."""
        start = window * self._window_shards
        return [int(shard) for shard in self._shards[start : start + self._window_shards]]

    def indices(self, start: int, stop: int) -> Indices:
        """Return the samples at positions start to stop - 1.

        Returns:
            (stop - start,) int64, indices into the set; fewer at the epoch's end.
        """
        stop = min(stop, len(self))
        pieces = []
        while start < stop:
            window = self.window_at(start)
            first = int(self._window_ends[window - 1]) if window else 0
            samples = self._window(window)[start - first : stop - first]
            pieces.append(samples)
            start += len(samples)
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def _window(self, window: int) -> Indices:
        if self._cached is None or self._cached[0] != window:
            ranges = [
                np.arange(self._firsts[shard], self._firsts[shard] + self._sizes[shard], dtype=np.int64)
                for shard in self.window_shard_numbers(window)
            ]
            samples = np.concatenate(ranges)
            self._cached = window, samples[permutation(len(samples), f"{self._key}/window/{window}")]
        return self._cached[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """The stream of all epochs, one after the other, cut into global batches and these into the ranks' parts."""

    counts: Sequence[int]
    """Samples of each shard, in the set's order."""
    set_hash: str
    seed: int
    window_shards: int
    """Shards whose samples are shuffled together."""
    batch_size: int
    """Samples per rank and batch."""
    rank: int
    world: int
    """Ranks that train together."""

    @property
    def global_batch(self) -> int:
        """Samples of a batch over all ranks."""
        return self.batch_size * self.world

    def order(self, epoch: int) -> EpochOrder:
        """Return the order of an epoch."""
        return EpochOrder(
            self.counts, set_hash=self.set_hash, seed=self.seed, epoch=epoch, window_shards=self.window_shards
        )

    def advance(self, place: Place, samples: int) -> Place:
        """Return the place so many samples on in the stream."""
        laps, position = divmod(place[1] + samples, sum(self.counts))
        return place[0] + laps, position

    def batches(self, start: Place, prefetch: Callable[[Sequence[int]], object]) -> Iterator[list[Sample]]:
        """Yield this rank's part of every global batch, without end.

        Args:
            start: where the first global batch starts.
            prefetch: called with the shards, by their place in the set, of each window entered and of the next.
        """
        order, order_epoch, window = self.order(start[0]), start[0], -1
        start = self.advance(start, self.rank * self.batch_size)
        while True:
            batch: list[Sample] = []
            at = start
            while len(batch) < self.batch_size:
                if at[0] != order_epoch:
                    order, order_epoch, window = self.order(at[0]), at[0], -1
                if order.window_at(at[1]) != window:
                    window = order.window_at(at[1])
                    prefetch(order.window_shard_numbers(window))
                    prefetch(order.window_shard_numbers(window + 1))
                found = order.indices(at[1], at[1] + self.batch_size - len(batch))
                batch.extend((at[0], int(index)) for index in found)
                at = self.advance(at, len(found))
            yield batch
            start = self.advance(start, self.global_batch)


def permutation(size: int, key: str) -> Indices:
    """Return a permutation of 0 .. size - 1, a function of its arguments alone on any machine."""
    digest = hashlib.sha256(key.encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64)
