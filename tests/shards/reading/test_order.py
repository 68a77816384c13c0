from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from shards.reading.order import EpochOrder, Slices, permutation

COUNTS = (4, 4, 1, 0, 5, 4, 2, 3)


def order(**changes: object) -> EpochOrder:
    arguments = {"counts": COUNTS, "set_hash": "ab" * 32, "seed": 0, "epoch": 0, "window_shards": 3, **changes}
    return EpochOrder(arguments.pop("counts"), **arguments)  # type: ignore[arg-type]


def whole(**changes: object) -> list[int]:
    made = order(**changes)
    return made.indices(0, len(made)).tolist()


def test_the_order_is_this_one_forever() -> None:
    """Golden: a change here breaks the resume of running trainings and needs an ORDER entry in the changelog."""
    assert whole() == GOLDEN
    assert permutation(8, "key").tolist() == [4, 0, 1, 6, 3, 7, 5, 2]


GOLDEN = [19, 11, 8, 13, 9, 12, 10, 18, 4, 5, 2, 7, 1, 20, 3, 22, 21, 6, 0, 14, 16, 17, 15]


def test_each_sample_comes_once_an_epoch() -> None:
    for counts in (COUNTS, (1,), (7,), (3,) * 6, (0, 2)):
        for window in (1, 2, 3, 8, 100):
            for epoch in range(3):
                assert sorted(whole(counts=counts, window_shards=window, epoch=epoch)) == list(range(sum(counts)))


def test_the_order_depends_on_set_seed_and_epoch() -> None:
    variants = [whole(), whole(seed=1), whole(epoch=1), whole(set_hash="cd" * 32), whole(window_shards=2)]
    assert len({tuple(variant) for variant in variants}) == len(variants)


def test_any_slice_is_computed_directly() -> None:
    reference = whole()
    for start in range(len(reference) + 2):
        for stop in range(start, len(reference) + 3):
            assert order().indices(start, stop).tolist() == reference[start:stop]


def test_only_the_shards_of_a_window_are_mixed() -> None:
    made = order()
    shard_of = np.repeat(np.arange(len(COUNTS)), COUNTS)
    start = window = 0
    while shards := made.window_shard_numbers(window):
        stop = start + sum(COUNTS[shard] for shard in shards)
        assert {int(s) for s in shard_of[made.indices(start, stop)]} <= set(shards)
        assert all(made.window_at(position) == window for position in range(start, stop))
        start, window = stop, window + 1
    assert start == len(made) and window == 3


def test_ranks_take_parts_of_the_stream_of_epochs_and_each_window_is_announced_as_it_is_entered() -> None:
    stream = [(epoch, index) for epoch in range(3) for index in whole(epoch=epoch)]
    for world, batch_size in ((1, 4), (2, 2), (4, 1)):
        parts = []
        for rank in range(world):
            announced: list[list[int]] = []
            slices = Slices(
                counts=COUNTS,
                set_hash="ab" * 32,
                seed=0,
                window_shards=3,
                batch_size=batch_size,
                rank=rank,
                world=world,
            )
            start = slices.advance((0, 0), 8)
            parts.append(list(islice(slices.batches(start, announced.append), 10)))
            first = order().window_at(8 + rank * batch_size)
            assert announced[:2] == [order().window_shard_numbers(window) for window in (first, first + 1)]
        assert [pair for batches in zip(*parts, strict=True) for batch in batches for pair in batch] == stream[
            8:48
        ]
        assert slices.advance(start, 40) == (48 // 23, 48 % 23)


def test_samples_spread_evenly_over_positions() -> None:
    places = np.stack([np.argsort(whole(counts=(10, 10, 10), epoch=epoch)) for epoch in range(600)])
    assert np.abs(places.mean(axis=0) - 14.5).max() < 2.0  # standard error 0.35
    neighbours = np.mean([abs(np.diff(whole(counts=(10, 10, 10), epoch=epoch))) == 1 for epoch in range(600)])
    assert abs(neighbours - 2 / 30) < 0.01


@pytest.mark.parametrize("changes", [{"window_shards": 0}, {"epoch": -1}])
def test_senseless_arguments_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="window_shards"):
        order(**changes)
