"""Batches for training, in an order that depends on nothing but (set, seed), resumed in O(1).

Rule of the order: the samples of epoch 0, then those of epoch 1 and so on, are one endless stream; global batch
n is its n-th slice of `batch_size * world` samples, of which rank r takes the r-th part. So there is no tail: a
batch that meets an epoch's end goes on into the next, every sample comes exactly once an epoch, and every batch
is full. Workers only decode; which of them does what has no say in the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from common.differences import require_same
from common.errors import DataError
from shards.files.names import CONDITIONING, GLYPHS, POSITIONS, PREDICTIONS, ROLLOUT
from shards.reading.order import EpochOrder
from shards.reading.reader import ShardSet
from shards.records.batch import Batch, collate_arrays

TRAINING_MEMBERS = (CONDITIONING, ROLLOUT, GLYPHS, POSITIONS)
"""What objectives read that need no stored predictions."""

Sample = tuple[int, int]
"""(epoch, index in the set)."""


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
        """Say what is read and how; nothing is read before iteration.

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
        self._shards, self._seed, self._window_shards = shards, seed, window_shards
        self._batch_size, self._rank, self._world = batch_size, rank, world
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._members = (*TRAINING_MEMBERS, PREDICTIONS) if predictions else TRAINING_MEMBERS
        self._set_hash = shards.set_hash
        self._counts = shards.counts
        self._epoch, self._position = 0, 0

    @property
    def global_batch(self) -> int:
        """Samples of a batch over all ranks."""
        return self._batch_size * self._world

    @property
    def epoch(self) -> int:
        """Epoch of the next sample."""
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        """Return where the batches handed out so far end: the same on every rank, for any number of workers."""
        return {
            "set_hash": self._set_hash,
            "seed": self._seed,
            "window_shards": self._window_shards,
            "epoch": self._epoch,
            "position": self._position,
            "global_batch": self.global_batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; takes effect at the next `iter`.

        Raises:
            DataError: the state is of another set, seed, window or global batch.
        """
        place = ("epoch", "position")
        own, saved = ({k: v for k, v in of.items() if k not in place} for of in (self.state_dict(), state))
        require_same(
            own,
            saved,
            "the run cannot go on in the same order",
            "give the shards that the run was started on, keep train.seed and shards.window_shards, and choose "
            "train.batch_size so that batch size x processes is the same",
        )
        if not (state["epoch"] >= 0 and 0 <= state["position"] < len(self._shards)):
            raise DataError(
                f"loader state: epoch {state['epoch']}, position {state['position']} is not in the set"
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    def __iter__(self) -> Iterator[Batch]:
        workers: dict[str, Any] = {}
        if self._num_workers:
            workers = {"num_workers": self._num_workers, "prefetch_factor": 2}
        loader = DataLoader(
            _Samples(self._shards, self._members),
            batch_sampler=_RankBatches(self, self._epoch, self._position),
            collate_fn=_identity,
            pin_memory=self._pin_memory,
            **workers,
        )
        for batch in loader:
            if isinstance(batch, str):
                raise DataError(batch)
            self._epoch, self._position = self._advance(self._epoch, self._position, self.global_batch)
            yield batch

    def order(self, epoch: int) -> EpochOrder:
        """Return the order of an epoch."""
        return EpochOrder(
            self._counts, set_hash=self._set_hash, seed=self._seed, epoch=epoch, window_shards=self._window_shards
        )

    def _advance(self, epoch: int, position: int, samples: int) -> tuple[int, int]:
        laps, position = divmod(position + samples, len(self._shards))
        return epoch + laps, position


class _RankBatches(Sampler[list[Sample]]):
    """This rank's part of every global batch from a position on, without end."""

    def __init__(self, loader: ShardLoader, epoch: int, position: int) -> None:
        self._loader, self._epoch, self._position = loader, epoch, position

    def __iter__(self) -> Iterator[list[Sample]]:
        loader = self._loader
        order, order_epoch, window = loader.order(self._epoch), self._epoch, -1
        epoch, position = loader._advance(self._epoch, self._position, loader._rank * loader._batch_size)
        while True:
            batch: list[Sample] = []
            at = epoch, position
            while len(batch) < loader._batch_size:
                if at[0] != order_epoch:
                    order, order_epoch, window = loader.order(at[0]), at[0], -1
                if order.window_at(at[1]) != window:
                    window = order.window_at(at[1])
                    loader._shards.prefetch(order.window_shard_numbers(window))
                    loader._shards.prefetch(order.window_shard_numbers(window + 1))
                found = order.indices(at[1], at[1] + loader._batch_size - len(batch))
                batch.extend((at[0], int(index)) for index in found)
                at = loader._advance(*at, len(found))
            yield batch
            epoch, position = loader._advance(epoch, position, loader.global_batch)


class _Samples(Dataset[Batch | str]):
    """Reads and collates a batch; an error comes back as its text, for torch wraps exceptions in tracebacks."""

    def __init__(self, shards: ShardSet, members: Sequence[str]) -> None:
        self._shards, self._members = shards, members

    def __getitems__(self, samples: list[Sample]) -> Batch | str:
        try:
            rows = [self._shards.arrays(index, self._members) for _epoch, index in samples]
            return collate_arrays(rows, [index for _epoch, index in samples], [epoch for epoch, _index in samples])
        except DataError as error:
            return str(error)


def _identity(batch: Any) -> Any:
    """Collation is done by the dataset."""
    return batch
