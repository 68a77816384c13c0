"""Damage of every kind that we can think of is named before a damaged record is used, or it changes no record."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import DataError
from shards.files.failures import read_failures
from shards.looking.finalize import finalize
from shards.looking.verify import verify_set
from shards.reading.reader import ShardSet
from shards.records.codec import encode_record
from shards.records.members import CONDITIONING, ROLLOUT
from shards.writing.writer import ShardWriter
from tests.shards.builders import (
    PROVENANCE,
    flip_bit,
    input_ids,
    join_set,
    make_record,
    write_over,
    write_set,
)

IDS = input_ids(10)
SIDECAR = "shard-000001.json"
NAME = "shard-000001.tar"  # holds IDS[4:8]
EXPECTED = {input_id: encode_record(make_record(input_id)) for input_id in IDS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", IDS)
    return tmp_path / "set"


def read_all(shards: ShardSet) -> tuple[list[str], list[str]]:
    """Read every sample: ids of those that came back right, messages of those that were refused."""
    right, refused = [], []
    for index in range(len(shards)):
        try:
            record = shards[index]
        except DataError as error:
            refused.append(str(error))
        else:
            assert encode_record(record) == EXPECTED[record.meta.input_id], "a damaged record was handed out"
            right.append(record.meta.input_id)
    return right, refused


def verify(shards: ShardSet) -> list[str]:
    return [damage.message for damage in verify_set(shards)]


def test_a_sound_set_verifies(folder: Path) -> None:
    shards = ShardSet.open(folder)
    assert verify(shards) == [] and read_all(shards) == (IDS, [])


@pytest.mark.parametrize("tail", [b"\x00\x7e", b"\x00\x7c", b"\x00\xfc"], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("member", [CONDITIONING, ROLLOUT])
def test_a_tensor_that_was_written_with_a_nan_is_damage_whatever_its_checksums(
    folder: Path, member: str, tail: bytes
) -> None:
    name = {CONDITIONING: "text_context", ROLLOUT: "rollout_latents"}[member]
    key = write_over(folder, 1, 2, member, tail)
    (message,) = verify(ShardSet.open(folder))
    assert f"{NAME}: sample {key}, {member}: {name} holds NaN or infinity" in message
    with pytest.raises(DataError, match=f"damaged: .*{key}"):
        finalize(folder)
    kept = ShardSet.open(folder, exclude_damaged=True)
    assert kept.excluded == {NAME: [key]} and len(kept) == len(IDS) - 1


def test_truncation_at_every_block_is_found_by_name_and_the_rest_can_be_used(folder: Path) -> None:
    path = folder / NAME
    whole = path.read_bytes()
    opened = ShardSet.open(folder)
    for size in range(0, len(whole), 512):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=NAME):
            ShardSet.open(folder)
        messages = verify(opened)
        assert messages and all(NAME in message for message in messages)
        right, refused = read_all(pickle.loads(pickle.dumps(opened)))  # as if cut while training runs
        assert len(right) + len(refused) == 10 and all(NAME in message for message in refused)
        rest = ShardSet.open(folder, exclude_damaged=True)
        assert read_all(rest) == (right, []) and rest.set_hash != opened.set_hash
    path.write_bytes(whole)
    assert ShardSet.open(folder).set_hash == opened.set_hash


def test_no_flipped_bit_of_a_shard_reaches_a_record_and_verify_finds_each(folder: Path) -> None:
    path = folder / NAME
    whole = path.read_bytes()
    members = [m for entry in ShardSet.open(folder).table(1) for m in entry.members]
    lost = 0
    for bit in range(3, 8 * len(whole), 1597):
        flip_bit(path, bit)
        shards = ShardSet.open(folder)
        right, refused = read_all(shards)
        in_a_member = any(m.offset <= bit // 8 < m.offset + m.length for m in members)
        assert len(refused) == int(in_a_member) and len(right) == 10 - len(refused)
        messages = verify(shards)
        assert len(messages) == 1 and NAME in messages[0]
        if bit % 10 == 0:
            with pytest.raises(DataError, match=NAME):
                finalize(folder)
        lost += len(refused)
        path.write_bytes(whole)
    assert lost > 30


def test_no_flipped_bit_of_a_sidecar_goes_unnoticed(folder: Path) -> None:
    path = folder / "shard-000001.json"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 211):
        flip_bit(path, bit)
        try:
            shards = ShardSet.open(folder)
        except DataError as error:
            assert path.name in str(error)
        else:
            right, refused = read_all(shards)
            assert right == IDS[:4] + IDS[8:] and all(path.name in message for message in refused)
            assert any(path.name in message for message in verify(shards))
        rest = ShardSet.open(folder, exclude_damaged=True)
        assert read_all(rest) == (IDS[:4] + IDS[8:], [])
        assert any(path.name in message for message in rest.left_out)
        path.write_bytes(whole)


def test_a_cut_sidecar_goes_unnoticed_nowhere(folder: Path) -> None:
    path = folder / "shard-000001.json"
    whole = path.read_bytes()
    for size in range(0, len(whole), 64):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=path.name):
            read_all_or_raise(ShardSet.open(folder))


def read_all_or_raise(shards: ShardSet) -> None:
    for _record in shards:
        pass


@pytest.mark.parametrize(
    "injury, named",
    [
        (lambda d: (d / NAME).unlink(), f"{NAME}.* the shard is missing"),
        (lambda d: (d / NAME).write_bytes(b""), f"{NAME}.* the shard is empty"),
        (lambda d: (d / SIDECAR).unlink(), f"{NAME}: it has no sidecar"),
        (lambda d: (d / SIDECAR).write_bytes(b""), f"{SIDECAR}.* empty"),
        (lambda d: [(d / name).unlink() for name in (NAME, SIDECAR)], f"{NAME}: planned, not written"),
        (lambda d: shutil.copy(d / "shard-000000.json", d / SIDECAR), "sidecar of shard-000000.tar, renamed"),
        (lambda d: [(d / name).rename(d / name.replace("1", "7")) for name in (NAME, SIDECAR)], "renamed"),
    ],
)
def test_what_is_missing_or_in_the_wrong_place_is_named(
    folder: Path, injury: Callable[[Path], object], named: str
) -> None:
    injury(folder)
    with pytest.raises(DataError, match=named):
        ShardSet.open(folder)
    rest = ShardSet.open(folder, exclude_damaged=True)
    assert read_all(rest) == (IDS[:4] + IDS[8:], []) and rest.left_out


def test_shards_that_swapped_their_names_are_refused_by_every_sample(tmp_path: Path) -> None:
    write_set(tmp_path, IDS[:9], samples_per_shard=3)  # all shards have one size
    first, second, between = (tmp_path / name for name in ("shard-000000.tar", NAME, "between"))
    for source, target in ((first, between), (second, first), (between, second)):
        source.rename(target)
    shards = ShardSet.open(tmp_path)
    right, refused = read_all(shards)
    assert right == IDS[6:9] and len(refused) == 6 and all("or renamed" in message for message in refused)
    assert {message.split(":")[0] for message in verify(shards)} == {first.name, second.name}
    assert read_all(ShardSet.open(tmp_path, exclude_damaged=True)) == (right, [])


def test_a_sidecar_of_another_set_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    join_set(other, model="sd15")
    shutil.copy(other / "manifest.json", folder)
    shutil.copy(other / "uncond.safetensors", folder)
    with pytest.raises(DataError, match="belongs to another set"):
        ShardSet.open(folder)


def test_a_sidecar_of_another_run_of_the_same_set_is_refused_by_every_sample(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_set(other, [f"{name[1:]}x" for name in IDS])  # same identity, other inputs of the same length
    shutil.copy(other / "shard-000001.json", folder)
    try:
        shards = ShardSet.open(folder)
    except DataError as error:
        assert NAME in str(error)
        return
    _right, refused = read_all(shards)
    assert len(refused) == 4 and all(NAME in message for message in refused)
    assert verify(shards)


def test_a_rewritten_shard_does_not_enter_a_run_that_froze_the_old_one(folder: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(folder)
    shards.freeze(tmp_path / "run")
    other = tmp_path / "other"
    write_set(other, [f"{name[1:]}x" for name in IDS])
    for suffix in ("tar", "json"):
        shutil.copy(other / f"shard-000001.{suffix}", folder)
    with pytest.raises(DataError, match=f"{NAME}: its content is not that which the run was started on"):
        ShardSet.open_frozen(tmp_path / "run")
    with pytest.raises(DataError, match="changed since the set was opened"):
        read_all_or_raise(shards)


def test_a_frozen_set_with_exclusions_opens_the_same_again(folder: Path, tmp_path: Path) -> None:
    member = ShardSet.open(folder).table(1)[2].members[1]
    flip_bit(folder / NAME, 8 * member.offset + 5)
    (folder / "shard-000002.tar").write_bytes((folder / "shard-000002.tar").read_bytes()[:10000])
    rest = ShardSet.open(folder, exclude_damaged=True)
    rest.freeze(tmp_path / "run")
    again = ShardSet.open_frozen(tmp_path / "run")
    assert again.set_hash == rest.set_hash and read_all(again) == read_all(rest)
    assert again.excluded == {NAME: ["000000006"], "shard-000002.tar": ["000000009"]}
    flip_bit(tmp_path / "run" / "shards.json", 900)
    with pytest.raises(DataError, match=r"shards\.json"):
        ShardSet.open_frozen(tmp_path / "run")
    with pytest.raises(DataError, match="not the folder of a training run"):
        ShardSet.open_frozen(tmp_path)


def test_a_run_goes_on_where_its_set_was_moved_to(folder: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(folder)
    shards.freeze(tmp_path / "run")
    folder.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="not a set of shards"):
        ShardSet.open_frozen(tmp_path / "run")
    assert ShardSet.open_frozen(tmp_path / "run", tmp_path / "moved").set_hash == shards.set_hash


def test_a_set_in_work_opens_only_when_asked_to(folder: Path) -> None:
    for suffix in ("tar", "json"):
        (folder / f"shard-000002.{suffix}").unlink()
    with pytest.raises(DataError, match="incomplete .*allow-incomplete"):
        ShardSet.open(folder)
    shards = ShardSet.open(folder, allow_incomplete=True)
    assert len(shards) == 8 and shards.left_out == ("shard-000002.tar: planned, not written",)


def test_temporary_files_are_never_read(folder: Path) -> None:
    before = ShardSet.open(folder).set_hash
    for name in (
        f".{NAME}.vm.0123456789ab.tmp",
        "shard-000009.json.bak",
        ".shard-000009.json.vm.x.tmp",
        "notes.txt",
    ):
        (folder / name).write_bytes(b"rubbish")
    assert ShardSet.open(folder).set_hash == before


def test_finalize_sums_up_and_refuses_what_is_missing(folder: Path) -> None:
    write_set(folder, [*IDS, "bad1", "new1"])
    summary = finalize(folder)
    assert (summary.samples, summary.failed, summary.shards) == (11, 1, 4)
    assert summary.failures == {"image missing": 1} and summary.set_hash == ShardSet.open(folder).set_hash
    assert (folder / "summary.json").exists()
    assert summary.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    values = [make_record(i).rollout_latents.double() for i in [*IDS, "new1"]]
    assert summary.ranges["rollout_latents"]["max"] == max(float(v.max()) for v in values)
    assert summary.ranges["rollout_latents"]["min"] == min(float(v.min()) for v in values)
    rms = (sum(float(v.square().sum()) for v in values) / sum(v.numel() for v in values)) ** 0.5
    assert summary.ranges["rollout_latents"]["rms"] == pytest.approx(rms)
    (folder / "failures" / "shard-000003.jsonl").unlink()
    assert list(read_failures(folder)) == []
    with pytest.raises(DataError, match="12 inputs are planned, 11 are recorded and 0 failed"):
        finalize(folder)


def test_the_measured_rounding_error_is_that_of_rounding(tmp_path: Path) -> None:
    """Records rounded from float64 to float16 differ from it by what summary.json says."""
    exact = torch.randn(1, 5, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    record = dataclasses.replace(make_record("a"), rollout_latents=exact.half())
    manifest = join_set(tmp_path)
    with ShardWriter(tmp_path, 0, identity_sha256=manifest.identity_sha256, provenance=PROVENANCE) as writer:
        writer.add(0, record)
        writer.commit()
    measured = finalize(tmp_path).rounding_error
    assert set(measured) == {"states", "phases_1", "phases_2", "phases_4"}
    assert measured["states"] == pytest.approx(
        float((exact.half().double() - exact).square().mean().sqrt()), rel=0.1
    )
    assert measured["phases_4"] > measured["phases_1"]


@pytest.mark.parametrize(
    "change", [{"name": "../../evil.json"}, {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}]
)
def test_a_member_that_points_elsewhere_is_found_and_leads_nowhere(
    folder: Path, change: dict[str, object]
) -> None:
    path = folder / NAME
    data = bytearray(path.read_bytes())
    header = tarfile.TarInfo.frombuf(bytes(data[:512]), "utf-8", "strict")
    for key, value in change.items():
        setattr(header, key, value)
    data[:512] = header.tobuf(tarfile.USTAR_FORMAT)[:512]
    path.write_bytes(data)

    shards = ShardSet.open(folder)
    assert any(NAME in message for message in verify(shards))
    right, refused = read_all(shards)  # by the sidecar's offsets: names and links in the tar are never followed
    assert len(right) == len(IDS) and not refused
    assert not (folder.parent.parent / "evil.json").exists()
