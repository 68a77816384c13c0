"""Record to bytes and back: the members of one webdataset sample.

Encoding is deterministic. Decoding needs only the members that are asked for: `decode_arrays` returns views of the
given bytes and needs no torch; `decode_record` makes a checked `Record`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from common.errors import DataError
from shards.records.members import CONDITIONING, GLYPHS, JSON, POSITIONS, PREDICTIONS, REQUIRED_MEMBERS, ROLLOUT
from shards.records.meta import SampleMeta
from shards.records.png import decode_mask, encode_mask
from shards.records.tensor_file import Array, dump_tensors, load_tensors

if TYPE_CHECKING:
    from common.anytext2.conditioning import Uncond
    from shards.records.record import Record

_HALF, _LONG = np.dtype("<f2"), np.dtype("<i8")

TENSORS: dict[str, dict[str, tuple[np.dtype[np.generic], int]]] = {
    CONDITIONING: {"image_context": (_HALF, 2), "masked_latents": (_HALF, 3), "text_context": (_HALF, 2)},
    ROLLOUT: {"rollout_latents": (_HALF, 5), "rollout_timesteps": (_LONG, 1)},
    PREDICTIONS: {"x0_cond": (_HALF, 5), "x0_uncond": (_HALF, 5)},
}
"""Tensors of each safetensors member: dtype and number of dimensions."""
_UNCOND = {"image_context": (_HALF, 2), "text_context": (_HALF, 2)}
_MASK_BITS = {GLYPHS: 1, POSITIONS: 8}


def encode_record(record: Record) -> dict[str, bytes]:
    """Serialise a record.

    Returns:
        Member name to bytes, in the order of `members.MEMBERS`; `x0.safetensors` only if the record has
        predictions.
    """
    members = {JSON: record.meta.to_json()}
    for member, tensors in TENSORS.items():
        if member != PREDICTIONS or record.x0_cond is not None:
            members[member] = dump_tensors({name: getattr(record, name).detach().numpy() for name in tensors})
    members[GLYPHS] = encode_mask(record.glyphs[0].numpy(), 1)
    members[POSITIONS] = encode_mask(record.positions[0].numpy(), 8)
    if PREDICTIONS in members:
        members[PREDICTIONS] = members.pop(PREDICTIONS)  # last, so that what training always reads is contiguous
    return members


def decode_arrays(members: Mapping[str, bytes], where: str) -> dict[str, Array]:
    """Decode the tensors of the given members.

    Args:
        members: name to bytes; `json` is ignored.
        where: what is read, for errors, e.g. "shard-000012.tar, sample 000000123".

    Returns:
        Field name of `Record` to a read-only array.

    Raises:
        DataError: a member is damaged, or its tensors are not those of the schema.
    """
    arrays: dict[str, Array] = {}
    for member, data in members.items():
        if member in TENSORS:
            arrays.update(_load_checked(data, TENSORS[member], f"{where}, {member}"))
        elif member in _MASK_BITS:
            mask = decode_mask(data, _MASK_BITS[member], f"{where}, {member}")
            arrays[member.removesuffix(".png")] = mask[None]  # (1, H, W)
        elif member != JSON:
            raise DataError(f"{where}: unknown member {member!r}")
    return arrays


def decode_record(members: Mapping[str, bytes], where: str) -> Record:
    """Decode a whole record; its predictions are None unless `x0.safetensors` is among the members.

    Raises:
        DataError: a required member is missing or damaged, or the record breaks the schema.
    """
    import torch

    from shards.records.record import Record

    missing = [name for name in REQUIRED_MEMBERS if name not in members]
    if missing:
        raise DataError(f"{where}: members {missing} are missing")
    meta = SampleMeta.from_json(members[JSON], f"{where}, {JSON}")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in decode_arrays(members, where).items()}
    try:
        return Record(meta=meta, **tensors)
    except DataError as error:
        raise type(error)(f"{where}: {error}") from None


def encode_uncond(uncond: Uncond, metadata: Mapping[str, str]) -> bytes:
    """Serialise the unconditional contexts.

    Args:
        uncond: the contexts.
        metadata: free text kept in the file's header.

    Raises:
        DataError: they break the schema.
    """
    from shards.records.record import check_uncond

    check_uncond(uncond)
    return dump_tensors({name: getattr(uncond, name).detach().numpy() for name in _UNCOND}, metadata)


def decode_uncond(data: bytes, where: str) -> Uncond:
    """Decode the unconditional contexts.

    Raises:
        DataError: damaged, or not what the schema says.
    """
    import torch

    from common.anytext2.conditioning import Uncond
    from shards.records.record import check_uncond

    arrays = _load_checked(data, _UNCOND, where)
    return check_uncond(Uncond(**{name: torch.from_numpy(array.copy()) for name, array in arrays.items()}))


def _load_checked(
    data: bytes, expected: Mapping[str, tuple[np.dtype[np.generic], int]], where: str
) -> dict[str, Array]:
    arrays = load_tensors(data, where)
    if arrays.keys() != expected.keys():
        raise DataError(f"{where}: holds tensors {sorted(arrays)}, expected {sorted(expected)}")
    for name, (dtype, rank) in expected.items():
        array = arrays[name]
        if array.dtype != dtype or array.ndim != rank or not array.size:
            raise DataError(
                f"{where}: {name} is {array.dtype} of shape {array.shape}, expected {dtype} with {rank} dimensions"
            )
    return arrays
