"""Image files of unknown origin, read with suspicion."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from common.errors import reason
from common.faults import raise_disk_fault
from stage1_teacher.inputs.input import InputFailure

MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 1 << 26
"""67 megapixels: a file of kilobytes can claim gigabytes of pixels."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Pillow reads more; some of those start other programs."""


def read_image_file(path: Path, where: str) -> bytes:
    """Read an image file's bytes.

    Raises:
        InputFailure: it cannot be read or is larger than 256 MiB.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise_disk_fault(error, path)
        raise InputFailure("image missing", f"{where}: image {path.name!r}: {reason(error)}") from None
    if len(data) > MAX_FILE_BYTES:
        raise InputFailure(
            "image too large", f"{where}: image {path.name!r} has more than {MAX_FILE_BYTES >> 20} MiB"
        )
    return data


def decode_image(data: bytes, size: int, where: str) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Decode an image and resize it to a square, as upstream does (bilinear, aspect ratio not kept).

    Args:
        data: a JPEG, PNG, WebP or BMP file's bytes.
        size: side in pixels.
        where: for messages.

    Returns:
        (3, size, size) float32 in [-1, 1], and the file's own (width, height).

    Raises:
        InputFailure: the bytes are no complete image, or claim more than 67 megapixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputFailure(
                    "image too large", f"{where}: image of {width} x {height} pixels, at most {MAX_PIXELS}"
                )
            pixels = np.asarray(image.convert("RGB"))  # (h, w, 3)
    except InputFailure:
        raise
    except UnidentifiedImageError:  # its own message holds a memory address
        raise InputFailure("image unreadable", f"{where}: image is no {', '.join(FORMATS)} file") from None
    except Exception as error:  # on hostile bytes Pillow's decoders raise almost anything
        raise_disk_fault(error, where)
        message = " ".join(str(error).split())
        raise InputFailure("image unreadable", f"{where}: image cannot be decoded: {message}") from None
    if (height, width) != (size, size):
        pixels = cv2.resize(pixels, (size, size))
    values = pixels.astype(np.float32) / 127.5 - 1.0
    return np.ascontiguousarray(values.transpose(2, 0, 1)), (width, height)
