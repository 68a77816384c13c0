from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import DataError
from shards.records.codec import decode_arrays, decode_record, encode_record
from shards.records.members import CONDITIONING, GLYPHS, JSON, POSITIONS, PREDICTIONS, REQUIRED_MEMBERS, ROLLOUT
from shards.records.png import decode_mask, encode_mask
from shards.records.record import Record
from shards.records.tensor_file import MAX_HEADER_BYTES, dump_tensors, load_metadata, load_tensors
from tests.shards.builders import assert_same_record, make_record
from tests.shards.strategies import records

MEMBERS = encode_record(make_record("in0", predictions=True))


@settings(max_examples=60, deadline=None)
@given(record=records())
def test_any_record_that_the_schema_allows_comes_back_bit_by_bit(record: Record) -> None:
    members = encode_record(record)
    assert_same_record(decode_record(members, "here"), record)
    assert encode_record(record) == members


def test_predictions_are_a_member_of_their_own_at_the_end() -> None:
    assert list(MEMBERS) == [*REQUIRED_MEMBERS, PREDICTIONS]
    assert list(encode_record(make_record("in0"))) == list(REQUIRED_MEMBERS)
    without = decode_record({name: MEMBERS[name] for name in REQUIRED_MEMBERS}, "here")
    assert without.x0_cond is None and without.x0_uncond is None


def test_only_the_members_asked_for_are_decoded() -> None:
    assert set(decode_arrays({ROLLOUT: MEMBERS[ROLLOUT]}, "here")) == {"rollout_latents", "rollout_timesteps"}
    with pytest.raises(DataError, match="here: members .*glyphs.png"):
        decode_record({name: data for name, data in MEMBERS.items() if name != GLYPHS}, "here")


def test_other_readers_open_every_member() -> None:
    record = make_record("in0", predictions=True)
    for member in (CONDITIONING, ROLLOUT, PREDICTIONS):
        for name, array in safetensors.numpy.load(MEMBERS[member]).items():
            np.testing.assert_array_equal(array, getattr(record, name).numpy())
    glyphs, positions = (Image.open(io.BytesIO(MEMBERS[name])) for name in (GLYPHS, POSITIONS))
    assert (glyphs.mode, positions.mode) == ("1", "L")
    np.testing.assert_array_equal(np.asarray(glyphs), record.glyphs[0].bool().numpy())
    np.testing.assert_array_equal(np.asarray(positions), record.positions[0].numpy())
    assert json.loads(MEMBERS[JSON])["input_id"] == "in0"


def test_files_of_the_library_are_read_and_metadata_is_kept() -> None:
    tensors = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a": np.arange(3),
        "c": np.zeros((0, 2), np.uint8),
    }
    for data in (safetensors.numpy.save(tensors, {"k": "v"}), dump_tensors(tensors, {"k": "v"})):
        received = load_tensors(data, "here")
        assert received.keys() == tensors.keys()
        for name, array in tensors.items():
            np.testing.assert_array_equal(received[name], array)
        assert load_metadata(data, "here") == {"k": "v"}
    assert dump_tensors(tensors) == safetensors.numpy.save(tensors)


def header_file(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + data


TENSOR = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}
ATTACKS = {
    "empty": b"",
    "short": b"\x01\0\0",
    "4 GB header": (1 << 32).to_bytes(8, "little") + b"{}",
    "all ones header": b"\xff" * 64,
    "header above the bound": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 1),
    "pickle": pickle.dumps({"a": 1}),
    "torch zip": (lambda b: (torch.save({"a": torch.ones(2)}, b), b.getvalue())[1])(io.BytesIO()),
    "not json": header_file(b"{,}"),
    "deep json": header_file(b"[" * 100_000),
    "not utf-8": header_file(b"\xff\xfe"),
    "list": header_file([]),
    "no fields": header_file({"a": {}}),
    "null entry": header_file({"a": None}),
    "unknown dtype": header_file({"a": {**TENSOR, "dtype": "BF16"}}, b"1234"),
    "list dtype": header_file({"a": {**TENSOR, "dtype": ["F16"]}}, b"1234"),
    "negative shape": header_file({"a": {**TENSOR, "shape": [-2]}}, b"1234"),
    "huge shape": header_file({"a": {**TENSOR, "shape": [1 << 62, 8]}}, b"1234"),
    "float shape": header_file({"a": {**TENSOR, "shape": [2.0]}}, b"1234"),
    "beyond the end": header_file({"a": {**TENSOR, "data_offsets": [2, 6]}}, b"1234"),
    "overlap": header_file({"a": TENSOR, "b": TENSOR}, b"1234"),
    "gap": header_file({"a": {**TENSOR, "data_offsets": [1, 5]}}, b"12345"),
    "rest": header_file({"a": TENSOR}, b"12345"),
    "metadata no table": header_file({"__metadata__": 3, "a": TENSOR}, b"1234"),
    "too many": header_file({f"t{i}": {**TENSOR, "shape": [0], "data_offsets": [0, 0]} for i in range(65)}),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_safetensors_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="here"):
        load_tensors(ATTACKS[name], "here")


def test_a_pickle_is_called_one() -> None:
    with pytest.raises(DataError, match="pickle"):
        load_tensors(ATTACKS["pickle"], "here")


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), cut=st.integers(0, 400), flip=st.integers(0, 3000))
def test_damaged_or_random_bytes_never_escape_as_another_error(data: bytes, cut: int, flip: int) -> None:
    whole = bytearray(MEMBERS[ROLLOUT][: len(MEMBERS[ROLLOUT]) - cut])
    whole[flip // 8 % len(whole)] ^= 1 << (flip % 8)
    for candidate in (data, bytes(whole), len(data).to_bytes(8, "little") + data):
        for member in (ROLLOUT, GLYPHS, JSON, PREDICTIONS):
            try:
                decode_record({**MEMBERS, member: candidate}, "here")
            except DataError as error:
                assert "here" in str(error)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_masks_of_any_size_come_back(data: st.DataObject) -> None:
    height, width, bits = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 8])))
    mask = np.frombuffer(data.draw(st.binary(min_size=height * width, max_size=height * width)), np.uint8)
    mask = mask.reshape(height, width) & (1 if bits == 1 else 255)
    np.testing.assert_array_equal(decode_mask(encode_mask(mask, bits), bits, "here"), mask)


def test_a_png_of_another_kind_or_a_bomb_is_refused() -> None:
    def png(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    mask = encode_mask(np.zeros((4, 4), np.uint8), 8)
    bomb = bytearray(encode_mask(np.zeros((8000, 8000), np.uint8), 1))
    bomb[16:24] = (4).to_bytes(4, "big") * 2  # says 4x4, inflates to 8 MB
    wide = bytearray(mask)
    wide[16:24] = (1 << 20).to_bytes(4, "big") * 2
    hostile = [
        b"", b"\x89PNG", png(Image.new("RGB", (4, 4))), png(Image.effect_noise((64, 64), 50)), bytes(bomb),
        bytes(wide), encode_mask(np.zeros((4, 4), np.uint8), 1), mask[:-1], mask + b"x",
    ]  # fmt: skip
    for data in hostile:
        with pytest.raises(DataError, match="here"):
            decode_mask(data, 8, "here")


def test_json_with_other_keys_is_refused() -> None:
    values = json.loads(MEMBERS[JSON])
    for changed in ({**values, "more": 1}, {k: v for k, v in values.items() if k != "seeds"}, [], None):
        with pytest.raises(DataError, match="here, json"):
            decode_record({**MEMBERS, JSON: json.dumps(changed).encode()}, "here")


def test_tensors_of_another_schema_are_refused() -> None:
    for tensors in ({"rollout_latents": np.zeros(3, np.float16)}, {"x": np.zeros(3, np.float16)}):
        with pytest.raises(DataError, match="here, rollout.safetensors"):
            decode_arrays({ROLLOUT: dump_tensors(tensors)}, "here")
    latents = {
        "rollout_latents": np.zeros((1, 2, 1, 1, 1), np.float32),
        "rollout_timesteps": np.zeros(1, np.int64),
    }
    with pytest.raises(DataError, match="rollout_latents is float32"):
        decode_arrays({ROLLOUT: dump_tensors(latents)}, "here")
