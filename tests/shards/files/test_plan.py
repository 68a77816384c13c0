from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import DataError
from shards.files.plan import extend_plan, read_plan
from tests.shards.builders import flip_bit, input_ids


def test_inputs_fill_shards_in_order_and_the_last_may_be_short(tmp_path: Path) -> None:
    plan = extend_plan(tmp_path, input_ids(10), 4)
    shards = list(plan.shards())
    assert [(s.shard_index, s.first_index, len(s.input_ids)) for s in shards] == [(0, 0, 4), (1, 4, 4), (2, 8, 2)]
    assert [i for s in shards for i in s.input_ids] == input_ids(10)
    assert (plan.num_shards, plan.num_inputs) == (3, 10)
    assert read_plan(tmp_path) == plan == extend_plan(tmp_path, input_ids(10), 4)


def test_new_inputs_start_a_new_shard_and_old_ones_stay(tmp_path: Path) -> None:
    before = list(extend_plan(tmp_path, input_ids(6), 4).shards())
    mixed = ["new1", *input_ids(3), "new2", "new1", *input_ids(6)]
    after = extend_plan(tmp_path, mixed, 3)
    assert list(after.shards())[:2] == before
    assert [(s.shard_index, s.first_index, s.input_ids) for s in after.shards()][2:] == [(2, 6, ("new1", "new2"))]
    assert extend_plan(tmp_path, input_ids(2), 4) == after  # a part of the inputs changes nothing


def test_racing_tasks_with_different_inputs_all_get_theirs(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: extend_plan(tmp_path, input_ids(5, f"task{n % 4}-"), 2), range(8)))
    plan = read_plan(tmp_path)
    ids = [i for shard in plan.shards() for i in shard.input_ids]
    assert sorted(ids) == sorted(i for n in range(4) for i in input_ids(5, f"task{n}-"))
    assert [shard.shard_index for shard in plan.shards()] == list(range(plan.num_shards))


def test_no_damage_to_a_plan_goes_unnoticed(tmp_path: Path) -> None:
    extend_plan(tmp_path, input_ids(5), 2)
    extend_plan(tmp_path, input_ids(9), 2)
    path = tmp_path / "plan" / "000000.txt"
    whole, plan = path.read_bytes(), read_plan(tmp_path)
    for bit in range(0, 8 * len(whole), 5):
        flip_bit(path, bit)
        with pytest.raises(DataError, match="000000.txt"):
            read_plan(tmp_path)
        path.write_bytes(whole)
    for data in (b"", whole[:-1], whole[:50]):
        path.write_bytes(data)
        with pytest.raises(DataError, match="000000.txt"):
            read_plan(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="000000.txt is missing"):
        read_plan(tmp_path)
    path.write_bytes((tmp_path / "plan" / "000001.txt").read_bytes())
    with pytest.raises(DataError, match="does not continue"):
        read_plan(tmp_path)
    path.write_bytes(whole)
    assert read_plan(tmp_path) == plan


@pytest.mark.parametrize("bad", ["", "a b", "a\n"])
def test_an_id_that_would_break_the_file_is_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(DataError, match="input id"):
        extend_plan(tmp_path, ["good", bad], 2)
