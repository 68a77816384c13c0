"""The shards are ordinary webdataset shards: other people's readers get every value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from shards.reading.reader import ShardSet
from shards.records.record import Record

MEMBERS = {
    "conditioning.safetensors": ("image_context", "text_context", "masked_latents"),
    "rollout.safetensors": ("rollout_latents", "rollout_timesteps"),
    "x0.safetensors": ("x0_cond", "x0_uncond"),
}


def assert_same_meta(received: dict[str, Any], record: Record) -> None:
    for name in type(record.meta).__slots__:
        np.testing.assert_equal(received[name], np.asarray(getattr(record.meta, name)).tolist(), err_msg=name)


def test_webdataset_streams_every_value(shared_set: Path, shards: ShardSet) -> None:
    import webdataset as wds

    urls = sorted(str(path) for path in shared_set.glob("shard-*.tar"))
    decode = wds.handle_extension("safetensors", safetensors.torch.load)
    count = 0
    for index, sample in enumerate(wds.WebDataset(urls, shardshuffle=False).decode(decode, "l8")):
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
