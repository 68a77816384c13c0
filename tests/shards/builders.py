"""Small records and sets for tests; other packages' tests may use them too."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from common.anytext2.conditioning import Uncond
from common.seeding import generator
from shards.files.failures import Failure
from shards.files.manifest import Manifest, create_or_check
from shards.files.names import shard_name, sidecar_name
from shards.files.plan import PlannedShard, extend_plan
from shards.files.sidecar import encode_sidecar
from shards.reading.reader import ShardSet
from shards.records.meta import SampleMeta
from shards.records.record import CHUNK_TOKENS, Record
from shards.writing.writer import ShardWriter, read_committed

IDENTITY = {"model": "tiny", "seed": 0, "solver": {"steps": 8, "guidance_scale": 7.5}, "fonts": ["f" * 64]}
PROVENANCE = {"device": "cpu", "torch": torch.__version__}
WIDTH, CHANNELS, SIDE, STRIDE, STEPS = 8, 4, 32, 8, 4
TIMESTEPS = (999, 749, 499, 249)


def make_record(input_id: str, *, rollouts: int = 1, predictions: bool = False, **changes: Any) -> Record:
    """Make a record whose values derive from its id; every third id has two chunks of context."""
    g = generator("record", input_id)
    small = SIDE // STRIDE
    latent = (CHANNELS, small, small)
    chunks = 1 + (sum(input_id.encode()) % 3 == 0)

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).half()

    states, predicted = (rollouts, STEPS + 1, *latent), (rollouts, STEPS, *latent)
    fields: dict[str, Any] = {
        "meta": make_meta(input_id, rollouts=rollouts),
        "image_context": half(CHUNK_TOKENS * chunks, WIDTH),
        "text_context": half(CHUNK_TOKENS, WIDTH),
        "masked_latents": half(*latent),
        "rollout_latents": half(*states),
        "rollout_timesteps": torch.tensor(TIMESTEPS),
        "glyphs": torch.randint(0, 2, (1, SIDE, SIDE), generator=g, dtype=torch.uint8),
        "positions": torch.randint(0, 3, (1, SIDE, SIDE), generator=g, dtype=torch.uint8),
        "x0_cond": half(*predicted) if predictions else None,
        "x0_uncond": half(*predicted) if predictions else None,
    }
    return Record(**{**fields, **changes})


def make_meta(input_id: str, /, *, rollouts: int = 1, **changes: Any) -> SampleMeta:
    """Make the words of a record."""
    fields: dict[str, Any] = {
        "input_id": input_id,
        "caption": f"a sign that says {input_id}, best quality",
        "text_caption": "Text says * . ",
        "texts": (input_id,),
        "languages": ("Latin",),
        "polygons": (((1, 2), (30, 2), (30, 12.5), (1, 12)),),
        "mode": "generate",
        "source": "rollout",
        "seeds": tuple(range(rollouts)),
        "size": (SIDE, SIDE),
        "guidance_scale": 7.5,
    }
    return SampleMeta(**{**fields, **changes})


def make_uncond() -> Uncond:
    """Make unconditional contexts."""
    g = generator("uncond")
    return Uncond(
        image_context=torch.randn(CHUNK_TOKENS, WIDTH, generator=g).half(),
        text_context=torch.randn(CHUNK_TOKENS, WIDTH, generator=g).half(),
    )


def input_ids(count: int, prefix: str = "in") -> list[str]:
    """Make ids."""
    return [f"{prefix}{number:04d}" for number in range(count)]


def join_set(folder: Path, **changes: Any) -> Manifest:
    """Create a set's manifest, or join it."""
    return create_or_check(folder, {**IDENTITY, **changes}, PROVENANCE, make_uncond)[0]


def write_shard(folder: Path, shard: PlannedShard, manifest: Manifest, **kwargs: Any) -> None:
    """Write one planned shard; inputs whose id starts with "bad" fail."""
    with ShardWriter(
        folder, shard.shard_index, identity_sha256=manifest.identity_sha256, provenance=PROVENANCE
    ) as writer:
        for offset, input_id in enumerate(shard.input_ids):
            index = shard.first_index + offset
            if input_id.startswith("bad"):
                writer.fail(Failure(input_id=input_id, sample_index=index, reason="image missing", message="no x"))
            else:
                writer.add(index, make_record(input_id, **kwargs))
        writer.commit()


def is_committed(folder: Path, shard_index: int, identity_sha256: str) -> bool:
    """Tell whether a shard need not be written."""
    return read_committed(folder, shard_name(shard_index), identity_sha256) is not None


def write_set(
    folder: Path, count: int | Sequence[str] = 10, *, samples_per_shard: int = 4, **kwargs: Any
) -> list[str]:
    """Do what `precompute` does: join the set, plan, write the shards that are not committed.

    Returns:
        The input ids.
    """
    ids = input_ids(count) if isinstance(count, int) else list(count)
    manifest = join_set(folder)
    for shard in extend_plan(folder, ids, samples_per_shard).shards():
        if not is_committed(folder, shard.shard_index, manifest.identity_sha256):
            write_shard(folder, shard, manifest, **kwargs)
    return ids


def assert_same_record(received: Record, expected: Record) -> None:
    """Compare every field, bit by bit."""
    assert received.meta == expected.meta
    for name in Record.__slots__:
        ours, theirs = getattr(received, name), getattr(expected, name)
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
        else:
            assert ours == theirs, name


def write_over(folder: Path, shard_number: int, sample: int, member: str, tail: bytes) -> str:
    """Let a member of a sample end in other bytes, as if the shard had been written so: all checksums are right.

    Returns:
        The sample's key.
    """
    shards = ShardSet.open(folder, allow_incomplete=True)
    header, entries = shards.headers[shard_number], shards.table(shard_number)
    entry = entries[sample]
    data = bytearray((folder / header.shard).read_bytes())
    members = []
    for found in entry.members:
        end = found.offset + found.length
        if found.name == member:
            data[end - len(tail) : end] = tail
        members.append(dataclasses.replace(found, crc32c=google_crc32c.value(bytes(data[found.offset : end]))))
    entries[sample] = dataclasses.replace(entry, members=tuple(members))
    (folder / header.shard).write_bytes(data)
    header = dataclasses.replace(header, sha256=hashlib.sha256(data).hexdigest())
    (folder / sidecar_name(header.shard)).write_bytes(encode_sidecar(header, entries))
    return entry.key


def flip_bit(path: Path, bit: int) -> None:
    """Flip one bit of a file in place."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)
