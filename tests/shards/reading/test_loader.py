from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import DataError
from shards.reading.loader import ShardLoader
from shards.reading.order import EpochOrder
from shards.reading.reader import ShardSet
from shards.records.batch import Batch, collate, collate_arrays
from shards.records.members import PREDICTIONS
from tests.shards.builders import flip_bit, make_record, write_set

GLOBAL_BATCH = 24  # every world below divides it; 30 samples, so that a batch meets an epoch's end
Stream = list[tuple[int, int]]


def make_loader(shards: ShardSet, world: int = 1, rank: int = 0, workers: int = 0, **changes: Any) -> ShardLoader:
    arguments = {"seed": 5, "batch_size": GLOBAL_BATCH // world, "window_shards": 3, **changes}
    return ShardLoader(shards, rank=rank, world=world, num_workers=workers, **arguments)


def expected_stream(shards: ShardSet, epochs: int) -> Stream:
    """Spell out the rule: epoch after epoch, each in its order."""
    orders = [
        EpochOrder(shards.counts, set_hash=shards.set_hash, seed=5, epoch=epoch, window_shards=3)
        for epoch in range(epochs)
    ]
    return [(epoch, int(i)) for epoch, order in enumerate(orders) for i in order.indices(0, len(order))]


def samples(batch: Batch) -> Stream:
    return list(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True))


def run(
    shards: ShardSet, world: int, workers: int, batches: int, state: dict[str, Any] | None
) -> tuple[Stream, Any]:
    """Take some global batches on every rank, one rank after the other."""
    parts, states = [], []
    for rank in range(world):
        loader = make_loader(shards, world, rank, workers)
        if state is not None:
            loader.load_state_dict(state)
        taken = list(itertools.islice(loader, batches))
        parts.append([samples(batch) for batch in taken])
        states.append(loader.state_dict())
    assert all(s == states[0] for s in states)
    return [sample for step in zip(*parts, strict=True) for part in step for sample in part], states[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_the_order_is_the_same_for_any_world_and_workers_however_often_resumed(
    shards: ShardSet, world: int, workers: int
) -> None:
    # 5 global batches = 120 samples = 4 epochs: resumed inside epochs 0, 1 and 3, and at the end of epoch 3
    stream: Stream = []
    state: Any = None
    for batches in (1, 1, 2, 1, 1):
        part, state = run(shards, world, workers, batches, state)
        stream += part
    assert stream == expected_stream(shards, 5)[: 6 * GLOBAL_BATCH]
    assert (state["epoch"], state["position"]) == (4, 24)


def test_worlds_may_change_between_resumes(shards: ShardSet) -> None:
    stream: Stream = []
    state: Any = None
    for world, workers in ((8, 0), (1, 2), (3, 0), (2, 2), (4, 0)):
        part, state = run(shards, world, workers, 1, state)
        stream += part
    assert stream == expected_stream(shards, 4)
    assert (state["epoch"], state["position"]) == (4, 0)  # exactly at a boundary


def test_the_size_of_batches_may_change_between_resumes(shards: ShardSet) -> None:
    loader = make_loader(shards, batch_size=24)
    stream = samples(next(iter(loader)))
    smaller = make_loader(shards, batch_size=4)
    smaller.load_state_dict(loader.state_dict())
    for batch in itertools.islice(smaller, 6):
        stream += samples(batch)
    assert stream == expected_stream(shards, 2)[:48]


def test_resuming_after_every_single_batch_changes_nothing(shards: ShardSet) -> None:
    stream: Stream = []
    state: Any = None
    for _ in range(40):
        loader = make_loader(shards, batch_size=7)
        if state is not None:
            loader.load_state_dict(state)
        stream += samples(next(iter(loader)))
        state = loader.state_dict()
    assert stream == expected_stream(shards, 10)[: 40 * 7]


def test_a_batch_larger_than_the_set_spans_epochs(shards: ShardSet) -> None:
    batch = next(iter(make_loader(shards, batch_size=70)))
    assert samples(batch) == expected_stream(shards, 3)[:70]


def test_the_state_counts_what_was_handed_out_not_what_workers_read_ahead(shards: ShardSet) -> None:
    loader = make_loader(shards, workers=2, batch_size=4)
    iterator = iter(loader)
    assert loader.state_dict()["position"] == 0
    for count in range(1, 4):
        next(iterator)
        assert loader.state_dict()["position"] == 4 * count
    del iterator


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_records_that_they_name(shards: ShardSet, workers: int) -> None:
    for batch in itertools.islice(make_loader(shards, workers=workers, predictions=True), 2):
        expected = collate(
            [shards[i] for i in batch.indices.tolist()], batch.indices.tolist(), batch.epochs.tolist()
        )
        assert_equal(batch, expected)


def assert_equal(ours: Any, theirs: Any) -> None:
    """Compare two dataclasses of tensors, and of such dataclasses."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif ours is None or theirs is None:
        assert ours is theirs
    else:
        for name in type(ours).__slots__:
            assert_equal(getattr(ours, name), getattr(theirs, name))


def test_predictions_are_not_read_unless_asked_for(tmp_path: Path) -> None:
    write_set(tmp_path, 4, predictions=True)
    shards = ShardSet.open(tmp_path)
    for entry in shards.table(0):
        member = next(m for m in entry.members if m.name == PREDICTIONS)
        flip_bit(tmp_path / "shard-000000.tar", 8 * member.offset)
    batch = next(iter(make_loader(shards, batch_size=4)))
    assert batch.x0_cond is None and batch.x0_uncond is None
    with pytest.raises(DataError, match=r"x0\.safetensors: crc32c"):
        next(iter(make_loader(shards, batch_size=4, predictions=True)))


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_stops_training_with_one_line_that_names_it(tmp_path: Path, workers: int) -> None:
    write_set(tmp_path, 8)
    member = ShardSet.open(tmp_path).table(1)[0].members[2]
    flip_bit(tmp_path / "shard-000001.tar", 8 * member.offset)
    with pytest.raises(DataError, match=r"^shard-000001.tar, sample 000000004, rollout.*crc32c is") as caught:
        list(itertools.islice(make_loader(ShardSet.open(tmp_path), workers=workers, batch_size=2), 4))
    assert "\n" not in str(caught.value)


def test_predictions_that_are_not_stored_are_refused_before_training(tmp_path: Path) -> None:
    write_set(tmp_path, 4)
    with pytest.raises(DataError, match="store_predictions"):
        make_loader(ShardSet.open(tmp_path), predictions=True)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"set_hash": "0" * 64}, "set_hash"),
        ({"seed": 6}, "seed: received 5, expected 6"),
        ({"window_shards": 4}, "window_shards: received 3, expected 4"),
        ({"position": 30}, "position 30"),
        ({"epoch": -1}, "epoch -1"),
    ],
)
def test_a_state_that_would_change_the_order_is_refused(
    shards: ShardSet, changes: dict[str, Any], named: str
) -> None:
    loader = make_loader(shards)
    with pytest.raises(DataError, match=named):
        loader.load_state_dict({**loader.state_dict(), **changes})


def test_the_state_is_small_and_plain(shards: ShardSet) -> None:
    state = make_loader(shards).state_dict()
    assert set(state) == {"set_hash", "seed", "window_shards", "epoch", "position", "global_batch"}
    assert len(pickle.dumps(state)) < 300


def test_a_senseless_rank_or_batch_is_refused(shards: ShardSet) -> None:
    for changes in ({"rank": 2, "world": 2}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="rank"):
            make_loader(shards, **changes)


def test_contexts_of_different_length_are_padded_and_masked() -> None:
    records = [make_record(name) for name in ("in0000", "in0001", "in0002")]
    lengths = [len(record.image_context) for record in records]
    assert len(set(lengths)) == 2
    batch = collate(records)
    context, mask = batch.conditioning.image_context, batch.conditioning.context_mask
    assert mask is not None and context.shape == (3, 154, 8) and mask.sum(1).tolist() == lengths
    for row, record in enumerate(records):
        assert torch.equal(context[row][mask[row]], record.image_context)
        assert not context[row][~mask[row]].any()
    assert len(batch) == 3 and batch.indices.tolist() == [0, 1, 2] and batch.epochs.tolist() == [0, 0, 0]


def test_records_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(DataError, match="sample 1: rollout_latents"):
        collate([make_record("in0000"), make_record("in0001", rollouts=2)])
    with pytest.raises(DataError, match="sample 1: x0_cond is missing"):
        collate([make_record("in0000", predictions=True), make_record("in0001")])
    rows = [{"image_context": torch.zeros(77, width).numpy()} for width in (8, 9)]
    with pytest.raises(DataError, match="sample 1: image_context is 9 wide"):
        collate_arrays(rows, [0, 1], [0, 0])
