"""safetensors bytes, read by a parser that trusts nothing and copies nothing.

The format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, the data.
A reader of shards meets only small files with a handful of float16 and int64 tensors, so everything else is
refused. The result is views of the given bytes: training reads a record without one copy. The library's own
reader reads what is written here, and the other way round (tests).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

MAX_HEADER_BYTES = 1 << 20
"""A header of ours has less than 1 KiB; the length field of a damaged or hostile file can say anything."""
MAX_TENSORS = 64

Array = NDArray[Any]

_DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def is_finite(value: Array) -> bool:
    """Tell whether a float16 array holds neither NaN nor infinity."""
    # arithmetic on float16 is slow on a CPU; its exponent bits are all set exactly for NaN and infinity
    return int(np.bitwise_and(value.view(np.uint16), 0x7C00).max(initial=0)) < 0x7C00


def dump_tensors(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """Serialise arrays; equal arrays give equal bytes.

    Tensors are laid out by item size, largest first, then by name, so that each is aligned; the header is
    padded with spaces to a multiple of 8 bytes, as the format's own library does.

    Raises:
        ValueError: a dtype other than float16, float32, int64 or uint8.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    pieces = []
    position = 0
    for name, value in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if value.dtype not in _NAMES:
            raise ValueError(f"tensor {name!r} has dtype {value.dtype}; expected one of {sorted(_DTYPES)}")
        data = np.ascontiguousarray(value).tobytes()
        header[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [position, position + len(data)],
        }
        pieces.append(data)
        position += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])


def load_tensors(data: bytes, where: str) -> dict[str, Array]:
    """Parse safetensors bytes into read-only views of them.

    Args:
        data: the whole file.
        where: what is read, for errors, e.g. "shard-000012.tar, sample 000000123, rollout.safetensors".

    Raises:
        DataError: not safetensors (a pickle under that name, say), a header longer than the file or than
            `MAX_HEADER_BYTES`, an unknown dtype, or tensors that overlap, leave gaps or leave the file.
    """
    header, body = _read_header(data, where)
    result: dict[str, Array] = {}
    spans = []
    for name, entry in header.items():
        dtype, shape, start, end = _check_entry(name, entry, len(data) - body, where)
        spans.append((start, end))
        result[name] = np.frombuffer(data, dtype, math.prod(shape), body + start).reshape(shape)
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise DataError(f"{where}: tensors overlap or leave a gap at byte {body + position} of the file")
        position = end
    if body + position != len(data):
        raise DataError(f"{where}: {len(data)} bytes, but its header describes {body + position}")
    return result


def load_metadata(data: bytes, where: str) -> dict[str, str]:
    """Return the free-text metadata of safetensors bytes.

    Raises:
        DataError: as `load_tensors`.
    """
    _length, header = _parse_header(data, where)
    return {str(key): str(value) for key, value in header.get("__metadata__", {}).items()}


def _parse_header(data: bytes, where: str) -> tuple[int, dict[str, Any]]:
    if len(data) < 8:
        raise DataError(f"{where}: {len(data)} bytes is too short for a safetensors file; is it empty or cut off?")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        kind = "; it looks like a pickle" if data[:1] == b"\x80" or data[:2] == b"PK" else ""
        raise DataError(
            f"{where}: not a safetensors file of ours: header length {length}, "
            f"expected at most {min(MAX_HEADER_BYTES, len(data) - 8)}{kind}"
        )
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: the safetensors header is not JSON ({error})") from None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise DataError(f"{where}: the safetensors header is not a table of tensors")
    if len(header) > MAX_TENSORS:
        raise DataError(
            f"{where}: {len(header)} tensors in the safetensors header, expected at most {MAX_TENSORS}"
        )
    return 8 + length, header


def _read_header(data: bytes, where: str) -> tuple[dict[str, Any], int]:
    body, header = _parse_header(data, where)
    header.pop("__metadata__", None)
    return header, body


def _check_entry(name: str, entry: Any, size: int, where: str) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    try:
        dtype_name, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{where}: tensor {name!r} lacks dtype, shape or data_offsets in the header") from None
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        raise DataError(f"{where}: tensor {name!r} has dtype {dtype_name!r}, expected one of {sorted(_DTYPES)}")
    dtype = _DTYPES[dtype_name]
    numbers = (*shape, start, end)
    if not all(type(number) is int and 0 <= number <= max(size, 1) for number in numbers) or len(shape) > 8:
        raise DataError(f"{where}: tensor {name!r} has shape {shape} at {start}:{end} in {size} bytes of data")
    if end - start != math.prod(shape) * dtype.itemsize or end > size:
        raise DataError(
            f"{where}: tensor {name!r} of shape {shape} and dtype {dtype_name} needs "
            f"{math.prod(shape) * dtype.itemsize} bytes, its offsets {start}:{end} give {end - start} of {size}"
        )
    return dtype, shape, start, end
