"""Pictures as arrays: side by side, in a labelled grid, and as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from common.files import require_suffix, write_bytes_atomic

Picture = NDArray[np.uint8]
"""(H, W, 3), RGB."""

_GAP, _LABEL_HEIGHT = 6, 20
"""Of a grid, pixels."""
_TILE = 144
"""Least width of a grid's tile, pixels; smaller pictures are enlarged by a whole factor."""


def grey(shades: NDArray[np.uint8]) -> Picture:
    """Return shades of grey, (H, W), as a picture."""
    return np.repeat(shades[..., None], 3, axis=2)


def beside(pictures: Sequence[Picture], gap: int = 4) -> Picture:
    """Put pictures of one height side by side, white between them."""
    white = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (white, picture)][1:]
    return np.concatenate(parts, axis=1)


def in_columns(columns: Mapping[str, Sequence[Picture]]) -> Picture:
    """Put pictures of one size into labelled columns, as many in each."""
    height, width = next(iter(columns.values()))[0].shape[:2]
    factor = max(1, -(-_TILE // width))
    rows = len(next(iter(columns.values())))
    size = (
        len(columns) * (width * factor + _GAP) + _GAP,
        rows * (height * factor + _GAP) + _GAP + _LABEL_HEIGHT,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for column, (label, pictures) in enumerate(columns.items()):
        x = _GAP + column * (width * factor + _GAP)
        draw.text((x, 3), label, fill="black", font=font)
        for row, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((width * factor, height * factor), Image.Resampling.BICUBIC)
            sheet.paste(tile, (x, _LABEL_HEIGHT + row * (height * factor + _GAP)))
    return np.asarray(sheet)


def in_grid(pictures: Sequence[Picture], columns: int) -> Picture:
    """Put pictures of one size into rows of so many, white between and after them."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    size = (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3)
    sheet = np.full(size, 255, np.uint8)
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        top, left = _GAP + row * (height + _GAP), _GAP + column * (width + _GAP)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def write_png(path: Path, picture: Picture, texts: Mapping[str, str] | None = None) -> None:
    """Write a picture as PNG, complete or not at all.

    Args:
        path: ends in .png.
        picture: RGB.
        texts: what the file says of itself, as PNG's text chunks by keyword.

    Raises:
        UsageError: the name says another format.
    """
    require_suffix(path, ".png")
    chunks, buffer = PngInfo(), io.BytesIO()
    for keyword, text in (texts or {}).items():
        chunks.add_text(keyword, text)  # an international one where Latin-1 does not do
    Image.fromarray(picture).save(buffer, format="PNG", pnginfo=chunks)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, buffer.getvalue())
