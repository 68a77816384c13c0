"""Masks as PNG: grey, 1 or 8 bits, rows unfiltered, so that bytes are fixed and decoding is one inflate.

Any PNG reader opens them. The decoder here reads only this kind, bounds what it inflates before it inflates,
and is several times faster than a general one, which matters: two masks are decoded for every training sample.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

MAX_SIDE = 8192
"""Largest width or height in pixels: bounds the memory that a hostile header can ask for."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LEVEL = 1
"""Masks inflate three times faster than from level 6, and are a few hundred bytes larger, of a record of a
megabyte."""


def encode_mask(mask: NDArray[np.uint8], bits: int) -> bytes:
    """Encode a mask.

    Args:
        mask: (H, W) uint8; values 0 and 1 if bits is 1 (1 is drawn white), 0 to 255 if bits is 8.
        bits: 1 or 8 per pixel.

    Returns:
        PNG bytes; equal masks give equal bytes (with one zlib version).
    """
    height, width = mask.shape
    rows = np.packbits(mask, axis=1) if bits == 1 else mask
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)  # filter type 0 before each row
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = zlib.compress(filtered.tobytes(), _LEVEL)
    return b"".join([_SIGNATURE, _chunk(b"IHDR", header), _chunk(b"IDAT", data), _chunk(b"IEND", b"")])


def decode_mask(data: bytes, bits: int, where: str) -> NDArray[np.uint8]:
    """Decode what `encode_mask` wrote.

    Args:
        data: PNG bytes.
        bits: 1 or 8, as expected; another depth is an error.
        where: what is read, for errors.

    Returns:
        (H, W) uint8.

    Raises:
        DataError: not a PNG of this kind, or damaged.
    """
    if len(data) < 57 or data[:8] != _SIGNATURE or data[12:16] != b"IHDR":
        raise DataError(f"{where}: not a PNG ({len(data)} bytes)")
    width, height, *kind = struct.unpack(">IIBBBBB", data[16:29])
    if kind != [bits, 0, 0, 0, 0] or not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise DataError(
            f"{where}: a PNG of {width}x{height}, {kind[0]} bits, colour type {kind[1]}; "
            f"expected {bits} bits grey, at most {MAX_SIDE} pixels a side"
        )
    (length,) = struct.unpack(">I", data[33:37])
    if data[37:41] != b"IDAT" or 41 + length + 16 != len(data):
        raise DataError(f"{where}: a PNG of {len(data)} bytes with other chunks than IHDR, IDAT, IEND")
    stride = 1 + (-(-width // 8) if bits == 1 else width)
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(data[41 : 41 + length], stride * height + 1)
    except zlib.error as error:
        raise DataError(f"{where}: damaged PNG data ({error})") from None
    if len(raw) != stride * height or not inflater.eof:
        raise DataError(f"{where}: PNG data inflates to another size than {width}x{height}")
    rows = np.frombuffer(raw, np.uint8).reshape(height, stride)
    if rows[:, 0].any():
        raise DataError(f"{where}: a PNG with filtered rows; it was not written by this project")
    return np.unpackbits(rows[:, 1:], axis=1, count=width) if bits == 1 else rows[:, 1:]


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
