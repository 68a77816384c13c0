from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from common.errors import DataError
from common.seeding import generator
from shards.trajectories import TrajectoryStore
from tests.shards.builders import flip_bit, input_ids

SHAPE, TIMESTEPS, BLOCK = (4, 3, 2), (999, 749, 499, 249), 3


def create(folder: Path, **changes: Any) -> TrajectoryStore:
    arguments = {
        "identity": {"seed": 0},
        "input_ids": input_ids(8),
        "timesteps": TIMESTEPS,
        "latent_shape": SHAPE,
        "block": BLOCK,
        **changes,
    }
    return TrajectoryStore.create_or_open(folder, **arguments)


def rollout(sample: int) -> torch.Tensor:
    return torch.randn(5, *SHAPE, generator=generator("rollout", sample)).half()


def write(store: TrajectoryStore, block: int) -> None:
    store.write_block(block, torch.stack([rollout(sample) for sample in store.block_samples(block)]))


def test_any_state_of_any_sample_comes_back(tmp_path: Path) -> None:
    store = create(tmp_path / "t")
    for block in (2, 0, 1):
        write(store, block)
    again = TrajectoryStore(tmp_path / "t")
    assert again.missing() == [] and again.num_blocks == 3 and again.input_ids == tuple(input_ids(8))
    for sample in range(8):
        assert torch.equal(again.read_rollout(sample), rollout(sample))
        for step in range(5):
            assert torch.equal(again.read(sample, step), rollout(sample)[step])
    array = zarr.open_array(str(tmp_path / "t" / "states"), mode="r")  # as anybody would
    assert array.metadata.zarr_format == 3 and array.shape == (8, 5, *SHAPE) and array.shards[0] == BLOCK
    np.testing.assert_array_equal(array[7, 2], rollout(7)[2].numpy())


def test_a_block_is_one_file_written_by_one_task(tmp_path: Path) -> None:
    store = create(tmp_path / "t")
    before = {path for path in (tmp_path / "t").rglob("*") if path.is_file()}
    write(store, 1)
    new = {path.relative_to(tmp_path / "t") for path in (tmp_path / "t").rglob("*") if path.is_file()} - before
    new = {path for path in new if (tmp_path / "t" / path) not in before}
    assert {str(path) for path in new} == {"states/c/1/0/0/0/0", "done/000001.json"}


def test_missing_does_not_look_like_zeros(tmp_path: Path) -> None:
    store = create(tmp_path / "t")
    write(store, 0)
    assert store.missing() == [1, 2]
    with pytest.raises(DataError, match=r"sample 3 \(in0003\): its block 1 was never written"):
        store.read(3, 0)
    store.write_block(1, torch.zeros(3, 5, *SHAPE))
    assert not store.read(3, 0).any()
    (tmp_path / "t" / "done" / "000000.json").unlink()  # as after a kill between file and record
    assert TrajectoryStore(tmp_path / "t").missing() == [0, 2]


def test_damage_and_a_lost_file_are_found(tmp_path: Path) -> None:
    store = create(tmp_path / "t")
    for block in range(3):
        write(store, block)
    path = tmp_path / "t" / "states" / "c" / "1" / "0" / "0" / "0" / "0"
    whole = path.read_bytes()
    wrong = 0
    for bit in range(0, 8 * len(whole), 1499):
        flip_bit(path, bit)
        opened = TrajectoryStore(tmp_path / "t")
        assert opened.missing() == [1]
        for sample in range(3, 6):
            try:
                assert torch.equal(opened.read_rollout(sample), rollout(sample))
            except DataError as error:
                assert f"sample {sample}" in str(error)
                wrong += 1
        path.write_bytes(whole)
    assert wrong > 5
    path.unlink()
    with pytest.raises(DataError, match="sample 4"):
        TrajectoryStore(tmp_path / "t").read(4, 0)


def test_a_damaged_short_block_is_written_anew(tmp_path: Path) -> None:
    store = create(tmp_path / "t")
    write(store, 2)
    path = tmp_path / "t" / "states" / "c" / "2" / "0" / "0" / "0" / "0"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    write(create(tmp_path / "t"), 2)
    assert path.read_bytes() == whole and TrajectoryStore(tmp_path / "t").missing() == [0, 1]


def test_a_failed_input_is_said_to_have_failed(tmp_path: Path) -> None:
    store = create(tmp_path / "t")
    store.write_block(
        0, torch.stack([rollout(0), torch.full_like(rollout(1), float("nan")), rollout(2)]), failed=[1]
    )
    store.write_block(1, torch.full((3, 5, *SHAPE), float("nan")), failed=[0, 1, 2])
    again = TrajectoryStore(tmp_path / "t")
    assert again.missing() == [2]
    assert torch.equal(again.read_rollout(2), rollout(2))
    for sample in (1, 3, 4, 5):
        with pytest.raises(DataError, match=rf"sample {sample} .* this input failed"):
            again.read(sample, 0)


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    create(tmp_path / "t")
    for changes, named in (({"block": 2}, "block"), ({"identity": {"seed": 1}}, "identity.seed: received 1")):
        with pytest.raises(DataError, match=named):
            create(tmp_path / "t", **changes)
    with pytest.raises(DataError, match="no trajectories"):
        TrajectoryStore(tmp_path / "none")


def test_wrong_states_are_refused(tmp_path: Path) -> None:
    store = create(tmp_path / "t")
    with pytest.raises(DataError, match="expected \\(3, 5, 4, 3, 2\\)"):
        store.write_block(0, torch.zeros(2, 5, *SHAPE))
    with pytest.raises(DataError, match="NaN"):
        store.write_block(0, torch.full((3, 5, *SHAPE), float("nan")))
    assert store.missing() == [0, 1, 2]


def _write_one(folder: Path, block: int) -> None:
    write(create(folder), block)


def test_racing_tasks_make_one_store_and_write_their_blocks(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    tasks = [context.Process(target=_write_one, args=(tmp_path / "t", block)) for block in range(2)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
        assert task.exitcode == 0
    store = TrajectoryStore(tmp_path / "t")
    assert store.missing() == [2]
    assert all(torch.equal(store.read_rollout(sample), rollout(sample)) for sample in range(6))
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
