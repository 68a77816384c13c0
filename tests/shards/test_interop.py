"""The shards are ordinary webdataset shards: other people's readers get every value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset

from common.errors import DataError
from shards.reading.reader import ShardSet
from shards.reading.stream import stream_records
from shards.records.record import Record
from tests.shards.builders import assert_same_record, flip_bit, write_set

README = Path(__file__).parents[2] / "README.md"

MEMBERS = {
    "conditioning.safetensors": ("image_context", "text_context", "masked_latents"),
    "rollout.safetensors": ("rollout_latents", "rollout_timesteps"),
    "x0.safetensors": ("x0_cond", "x0_uncond"),
}


def assert_same_meta(received: dict[str, Any], record: Record) -> None:
    for name in type(record.meta).model_fields:
        np.testing.assert_equal(received[name], np.asarray(getattr(record.meta, name)).tolist(), err_msg=name)


def test_webdataset_streams_every_value(shared_set: Path, shards: ShardSet) -> None:
    urls = sorted(str(path) for path in shared_set.glob("shard-*.tar"))
    decode = webdataset.handle_extension("safetensors", safetensors.torch.load)
    count = 0
    for index, sample in enumerate(webdataset.WebDataset(urls, shardshuffle=False).decode(decode, "l8")):
        record = shards[index]
        assert sample["__key__"] == shards.key(index)
        assert_same_meta(sample["json"], record)
        for member, names in MEMBERS.items():
            assert set(sample[member]) == set(names)
            for name in names:
                assert torch.equal(sample[member][name], getattr(record, name)), name
        np.testing.assert_array_equal(sample["glyphs.png"] // 255, record.glyphs[0].numpy())
        np.testing.assert_array_equal(sample["positions.png"], record.positions[0].numpy())
        count += 1
    assert count == len(shards) == 30


@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_datasets_reads_every_value(
    shared_set: Path, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    files = sorted(str(path) for path in shared_set.glob("shard-*.tar"))
    dataset = datasets.load_dataset(
        "webdataset", data_files={"train": files}, split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    count = 0
    for index, sample in enumerate(dataset):
        record = shards[index]
        assert sample["__key__"] == shards.key(index)
        assert_same_meta(sample["json"], record)
        for member, names in MEMBERS.items():
            value = sample[member]
            tensors = safetensors.torch.load(value) if isinstance(value, bytes) else value
            for name in names:
                assert torch.equal(torch.as_tensor(tensors[name]), getattr(record, name)), name
        np.testing.assert_array_equal(np.asarray(sample["glyphs.png"]), record.glyphs[0].bool().numpy())
        np.testing.assert_array_equal(np.asarray(sample["positions.png"]), record.positions[0].numpy())
        count += 1
    assert count == len(shards) == 30


def ids_of(records: Sequence[Record]) -> list[str]:
    return [record.meta.input_id for record in records]


def test_the_readmes_recipe_streams_the_set_in_batches(
    shared_set: Path, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = README.read_text().partition("## Read the shards elsewhere")[2]
    recipe = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert recipe is not None and "stream_records" in recipe[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "laion").symlink_to(shared_set)
    received: list[torch.Tensor] = []
    exec(recipe[1] + "    received.append(latents)\n", {"received": received})
    rows = {row.numpy().tobytes() for latents in received for row in latents}
    assert sum(map(len, received)) == 30 and rows == {r.rollout_latents.numpy().tobytes() for r in shards}


def test_a_stream_yields_every_record_in_the_sets_order(shards: ShardSet) -> None:
    stream = stream_records(shards)
    for _epoch in range(2):
        for received, expected in zip(stream, shards, strict=True):
            assert_same_record(received, expected)


@pytest.mark.parametrize("world, workers", [(1, 2), (2, 0), (3, 2), (16, 0)])
def test_nodes_and_workers_share_the_records_and_none_comes_twice(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, world: int, workers: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    parts = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        loader = webdataset.WebLoader(stream_records(shards, seed=1), batch_size=None, num_workers=workers)
        parts.append(ids_of(list(loader)))
    assert sorted(chain.from_iterable(parts)) == ids_of(list(shards))
    assert world > len(shards.headers) or all(parts)


def test_a_seed_shuffles_whole_shards(shards: ShardSet) -> None:
    first, again, other = (ids_of(list(stream_records(shards, seed=seed))) for seed in (1, 1, 2))
    assert first == again != other and sorted(first) == sorted(other) == ids_of(list(shards))
    starts = [
        first[place] for place in range(0, 30) if first[place] in ids_of([shards[i] for i in range(0, 30, 4)])
    ]
    assert len(starts) == 8 and starts != sorted(starts)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_ends_a_stream_by_name_and_is_left_out_when_asked(tmp_path: Path, workers: int) -> None:
    ids = write_set(tmp_path, 8)
    member = ShardSet.open(tmp_path).table(1)[2].members[2]
    flip_bit(tmp_path / "shard-000001.tar", 8 * member.offset)
    stream = stream_records(ShardSet.open(tmp_path))
    with pytest.raises(DataError, match=r"shard-000001\.tar, sample 000000006, rollout\.safetensors: crc32c"):
        list(webdataset.WebLoader(stream, batch_size=None, num_workers=workers))
    rest = stream_records(ShardSet.open(tmp_path, exclude_damaged=True))
    assert ids_of(list(rest)) == [*ids[:6], ids[7]]


def test_a_set_under_a_url_is_streamed_through_the_cache(
    shared_set: Path, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARD_CACHE_DIR", str(tmp_path / "cache"))
    stream = stream_records(ShardSet.open(f"file://{shared_set}"))
    assert ids_of(list(stream)) == ids_of(list(shards))
    assert len(list((tmp_path / "cache").glob("*.tar"))) == len(shards.headers)
