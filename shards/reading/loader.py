"""Batches for training, in an order that depends on nothing but (set, seed), resumed in O(1).

Rule of the order: the samples of epoch 0, then those of epoch 1 and so on, are one endless stream; global batch
n is its n-th slice of `batch_size * world` samples, of which rank r takes the r-th part. So there is no tail: a
batch that meets an epoch's end goes on into the next, every sample comes exactly once an epoch, and every batch
is full. Workers only decode; which of them does what has no say in the order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.differences import require_same
from common.errors import AppError, DataError, MachineError
from common.signals import blocked
from shards.reading.order import Place, Sample, Slices
from shards.reading.parcel import Parcel
from shards.reading.reader import ShardSet
from shards.reading.workers import worker_options
from shards.records.batch import Batch, collate_arrays
from shards.records.members import CONDITIONING, GLYPHS, POSITIONS, PREDICTIONS, ROLLOUT

TRAINING_MEMBERS = (CONDITIONING, ROLLOUT, GLYPHS, POSITIONS)
"""What objectives read that need no stored predictions."""


class ShardLoader:
    """Iterates over one rank's batches, endlessly; `state_dict` is the position of what was handed out.

    Example:
        loader = ShardLoader(shards, seed=0, batch_size=16, rank=rank, world=world, num_workers=2)
        loader.load_state_dict(saved)  # when resuming
        for batch in loader:
            ...
            saved = loader.state_dict()
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        window_shards: int = 8,
        num_workers: int = 0,
        predictions: bool = False,
        pin_memory: bool = False,
    ) -> None:
        """Choose the samples; none is read before iteration.

        Args:
            shards: the frozen set.
            seed: keys the order.
            batch_size: samples per rank and batch.
            rank: this process, 0 to world - 1.
            world: processes that train together.
            window_shards: shards whose samples are shuffled together.
            num_workers: processes that read and decode; 0 does it in this one.
            predictions: read x0_cond and x0_uncond too.
            pin_memory: hand out batches in page-locked memory.

        Raises:
            DataError: predictions are asked for and the set has none.
        """
        if not 0 <= rank < world or batch_size < 1:
            raise ValueError(f"rank {rank} of {world}, batch_size {batch_size}")
        if predictions and not shards.has_predictions:
            raise DataError(
                "the shards hold no one-step predictions (x0_cond, x0_uncond), which this objective needs; "
                "run precompute with precompute.store_predictions = true, or choose the objective `phased`"
            )
        self._shards, self._num_workers, self._pin_memory = shards, num_workers, pin_memory
        self._members = (*TRAINING_MEMBERS, PREDICTIONS) if predictions else TRAINING_MEMBERS
        self._slices = Slices(
            counts=shards.counts,
            set_hash=shards.set_hash,
            seed=seed,
            window_shards=window_shards,
            batch_size=batch_size,
            rank=rank,
            world=world,
        )
        self._place: Place = 0, 0  # where the next global batch starts

    @property
    def global_batch(self) -> int:
        """Samples of a batch over all ranks."""
        return self._slices.global_batch

    @property
    def epoch(self) -> int:
        """Epoch of the next sample."""
        return self._place[0]

    def state_dict(self) -> dict[str, Any]:
        """Return where the batches handed out so far end: the same on every rank, for any number of workers."""
        return {
            "set_hash": self._slices.set_hash,
            "seed": self._slices.seed,
            "window_shards": self._slices.window_shards,
            "epoch": self._place[0],
            "position": self._place[1],
            "global_batch": self.global_batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; takes effect at the next `iter`.

        Raises:
            DataError: the state is of another set, seed or window.
        """
        place = ("epoch", "position", "global_batch")  # the stream goes on from any place in batches of any size
        own, saved = ({k: v for k, v in of.items() if k not in place} for of in (self.state_dict(), state))
        require_same(
            own,
            saved,
            "the run cannot go on in the same order",
            "give the shards that the run was started on, and keep train.seed and shards.window_shards",
        )
        if not (state["epoch"] >= 0 and 0 <= state["position"] < len(self._shards)):
            raise DataError(
                f"loader state: epoch {state['epoch']}, position {state['position']} is not in the set"
            )
        self._place = int(state["epoch"]), int(state["position"])

    def __iter__(self) -> Iterator[Batch]:
        workers: dict[str, Any] = {}
        if self._num_workers:
            workers = {"num_workers": self._num_workers, "prefetch_factor": 2, **worker_options()}
        loader = DataLoader(
            _Samples(self._shards, self._members),
            batch_sampler=self._slices.batches(self._place, self._shards.prefetch),
            collate_fn=_identity,
            pin_memory=self._pin_memory,
            **workers,
        )
        with blocked():
            batches = iter(loader)  # starts the workers
        for batch in batches:
            if isinstance(batch, AppError):
                raise batch
            self._place = self._slices.advance(self._place, self.global_batch)
            yield batch


class _Samples(Dataset[Batch | Parcel | AppError]):
    """Reads and collates a batch; an error comes back as a value, for torch wraps exceptions in tracebacks."""

    def __init__(self, shards: ShardSet, members: Sequence[str]) -> None:
        self._shards, self._members = shards, members

    def __getitems__(self, samples: list[Sample]) -> Batch | Parcel | AppError:
        try:
            rows = [self._shards.arrays(index, self._members) for _epoch, index in samples]
            batch = collate_arrays(
                rows, [index for _epoch, index in samples], [epoch for epoch, _index in samples]
            )
        except (DataError, MachineError) as error:
            return type(error)(str(error))
        return batch if get_worker_info() is None or sys.platform != "linux" else Parcel(batch)


def _identity(batch: Any) -> Any:
    """Collation is done by the dataset."""
    return batch
