"""Pictures as arrays: side by side, in a labelled grid, and as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from common.files import require_suffix, write_bytes_atomic

Picture = NDArray[np.uint8]
"""(H, W, 3), RGB."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Of image files. Pillow reads more; some of those start other programs."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each orientation tag upright."""
_SIDEWAYS = {_TURNS[tag] for tag in (5, 6, 7, 8)}
_MAX_16_BITS = 65535
_GAP, _LABEL_HEIGHT = 6, 20
"""Of a grid, pixels."""
_TILE = 144
"""Least width of a grid's tile, pixels; smaller pictures are enlarged by a whole factor."""


def as_seen(image: Image.Image) -> Picture:
    """Return an opened image file as a viewer shows it.

    It is turned as its orientation tag says, what is transparent shows a white ground, 16 bits are scaled to 8,
    and a palette's numbers are its colours.

    Raises:
        ValueError: its pixels are of a kind that has no such reading.
        Exception: whatever Pillow's decoders raise on damaged bytes.
    """
    _scale_clear_color(image)
    image.load()
    upright = _upright(image)
    if upright.mode.startswith("I"):
        return _sixteen_bits(upright)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    if upright.mode == "F":
        raise ValueError("pixels are floating-point numbers without a known range")
    return np.asarray(upright.convert("RGB"))


def _scale_clear_color(image: Image.Image) -> None:
    """Scale the one colour that a PNG names as transparent as Pillow is going to scale the pixels, to 8 bits."""
    clear, tile = image.info.get("transparency"), getattr(image, "tile", None)
    stored_as = tile[0][3] if tile else None
    if isinstance(clear, int) and stored_as in ("L;2", "L;4"):
        image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[stored_as]
    elif isinstance(clear, tuple) and stored_as == "RGB;16B":
        image.info["transparency"] = tuple(channel >> 8 for channel in clear)


def size_as_seen(path: Path) -> tuple[int, int]:
    """Return an image file's (width, height), upright.

    Raises:
        OSError: it cannot be read, or is none of `FORMATS`.
        Exception: whatever Pillow's decoders raise on damaged bytes.
    """
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        turned = _turn(image) in _SIDEWAYS
        return (height, width) if turned else (width, height)


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info.update(image.info)
    return turned


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged tags turn nothing, as in viewers
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _sixteen_bits(image: Image.Image) -> Picture:
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > _MAX_16_BITS:
        raise ValueError(f"grey values of {values.min()} to {values.max()}, expected 0 to {_MAX_16_BITS}")
    shades = (values + 128) // 257  # 65535 to 255, rounded
    if (clear := image.info.get("transparency")) is not None:
        shades[values == clear] = 255
    return grey(shades.astype(np.uint8))


def grey(shades: NDArray[np.uint8]) -> Picture:
    """Return shades of grey, (H, W), as a picture."""
    return np.repeat(shades[..., None], 3, axis=2)


def beside(pictures: Sequence[Picture], gap: int = 4) -> Picture:
    """Put pictures of one height side by side, white between them."""
    white = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (white, picture)][1:]
    return np.concatenate(parts, axis=1)


def in_columns(columns: Mapping[str, Sequence[Picture]]) -> Picture:
    """Put pictures of one size into labelled columns, as many in each; a label may have several lines."""
    height, width = next(iter(columns.values()))[0].shape[:2]
    factor = max(1, -(-_TILE // width))
    rows = len(next(iter(columns.values())))
    head = _LABEL_HEIGHT * max(label.count("\n") + 1 for label in columns)
    size = (
        len(columns) * (width * factor + _GAP) + _GAP,
        rows * (height * factor + _GAP) + _GAP + head,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for column, (label, pictures) in enumerate(columns.items()):
        x = _GAP + column * (width * factor + _GAP)
        draw.text((x, 3), label, fill="black", font=font)
        for row, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((width * factor, height * factor), Image.Resampling.BICUBIC)
            sheet.paste(tile, (x, head + row * (height * factor + _GAP)))
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
    data = png_bytes(picture, texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, data)


def png_bytes(picture: Picture, texts: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a PNG file.

    Args:
        picture: RGB.
        texts: see `write_png`.
    """
    chunks, buffer = PngInfo(), io.BytesIO()
    for keyword, text in (texts or {}).items():
        chunks.add_text(keyword, text)  # an international one where Latin-1 does not do
    Image.fromarray(picture).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()
