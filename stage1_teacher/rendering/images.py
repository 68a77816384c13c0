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
from common.files import LFS_HEADER
from common.pictures import FORMATS, as_seen
from stage1_teacher.inputs.input import InputFailure

MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 1 << 26
"""67 megapixels: a file of kilobytes can claim gigabytes of pixels."""


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


def decode_image(
    data: bytes, size: int | tuple[int, int], where: str
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Decode an image as a viewer shows it, and resize it as upstream does (bilinear, aspect ratio not kept).

    Args:
        data: a JPEG, PNG, WebP or BMP file's bytes.
        size: side of the square in pixels, or (H, W).
        where: for messages.

    Returns:
        (3, H, W) float32 in [-1, 1], and the image's own (width, height), upright.

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
            pixels = as_seen(image)  # (h, w, 3)
    except InputFailure:
        raise
    except UnidentifiedImageError:  # its own message holds a memory address
        if data.startswith(LFS_HEADER):
            remedy = "fetch the image itself: git lfs pull"
            raise InputFailure("image unreadable", f"{where}: image is a git-lfs pointer; {remedy}") from None
        raise InputFailure("image unreadable", f"{where}: image is no {', '.join(FORMATS)} file") from None
    except Exception as error:  # on hostile bytes Pillow's decoders raise almost anything
        raise_disk_fault(error, where)
        message = " ".join(str(error).split())
        raise InputFailure("image unreadable", f"{where}: image cannot be decoded: {message}") from None
    height, width = pixels.shape[:2]
    rows, columns = (size, size) if isinstance(size, int) else size
    if (height, width) != (rows, columns):
        pixels = cv2.resize(pixels, (columns, rows))
    values = pixels.astype(np.float32) / 127.5 - 1.0
    return np.ascontiguousarray(values.transpose(2, 0, 1)), (width, height)
