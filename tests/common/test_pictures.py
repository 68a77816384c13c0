from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import UsageError
from common.pictures import Picture, as_seen, beside, grey, in_columns, in_grid, write_png


def picture(side: int, seed: int) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def test_pictures_stand_side_by_side_and_are_written_as_png(tmp_path: Path) -> None:
    both = beside([picture(32, 0), picture(32, 1)], gap=2)
    assert both.shape == (32, 66, 3) and (both[:, 32:34] == 255).all()
    write_png(tmp_path / "new" / "a.png", both)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), both)


def opened(image: Image.Image, kind: str = "PNG", **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_tag_says(kind: str, orientation: int) -> None:
    shown = np.zeros((32, 48, 3), np.uint8)
    shown[:16, :16] = 255  # the upper left is white, and nothing else
    as_stored = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud}
    as_stored |= {5: lambda x: x.transpose(1, 0, 2), 6: np.rot90, 8: lambda x: np.rot90(x, -1)}
    as_stored[7] = lambda x: np.rot90(x, 2).transpose(1, 0, 2)
    stored = Image.fromarray(np.ascontiguousarray(as_stored[orientation](shown)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = as_seen(opened(stored, kind, exif=exif))
    assert seen.shape == shown.shape and np.abs(seen.astype(int) - shown).max() < 60


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_tags_turn_nothing() -> None:
    image = Image.fromarray(picture(16, 0))
    assert np.array_equal(as_seen(opened(image, exif=b"Exif\0\0MM\0*\0\0\xff\xff")), np.asarray(image))
    exif = Image.Exif()
    exif[0x0112] = 99
    assert np.array_equal(as_seen(opened(image, exif=exif)), np.asarray(image))


def test_what_is_transparent_shows_white_and_what_is_not_shows_itself() -> None:
    pixels = np.dstack([picture(16, 0), np.full((16, 16), 255, np.uint8)])
    assert np.array_equal(as_seen(opened(Image.fromarray(pixels))), pixels[..., :3])
    pixels[:8, :, 3], pixels[8, :, 3] = 0, 51
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        seen = as_seen(opened(Image.fromarray(pixels), kind, **options))
        assert (seen[:8] == 255).all() and np.array_equal(seen[9:], pixels[9:, :, :3])
        assert np.abs(seen[8] - (0.2 * pixels[8, :, :3] + 0.8 * 255)).max() <= 1
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert as_seen(opened(palette)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert as_seen(opened(palette, transparency=0)).tolist() == [[[255] * 3, [40, 50, 60]]]
    assert as_seen(opened(Image.new("LA", (1, 1), (9, 0)))).tolist() == [[[255] * 3]]
    assert as_seen(opened(Image.new("L", (1, 1), 9), transparency=9)).tolist() == [[[255] * 3]]


@pytest.mark.parametrize(
    ("bits", "kind", "pixels", "clear", "seen"),
    [
        (1, 0, b"\x40", (0,), [255, 255]),
        (2, 0, b"\x18", (1,), [0, 255, 170]),
        (4, 0, b"\x12\x30", (2,), [17, 255, 51]),
        (8, 0, b"\x01\x02", (2,), [1, 255]),
        (16, 0, b"\x75\x30\x00\x02", (2,), [117, 255]),
        (8, 2, b"\x01\x01\x01\x02\x02\x02", (2, 2, 2), [1, 255]),
        (16, 2, b"\x75\x30" * 3 + b"\x12\x34" * 3, (0x1234,) * 3, [117, 255]),
    ],
)
def test_a_pngs_transparent_color_is_found_at_any_depth(
    bits: int, kind: int, pixels: bytes, clear: tuple[int, ...], seen: list[int]
) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", len(seen), 1, bits, kind, 0, 0, 0)
    body = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) + chunk(b"IDAT", zlib.compress(b"\0" + pixels))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")
    assert as_seen(Image.open(io.BytesIO(data)))[0, :, 0].tolist() == seen


def test_sixteen_bits_are_scaled_and_not_cut() -> None:
    values = np.array([[0, 30000, 65535, 257]], np.uint16)
    assert as_seen(opened(Image.fromarray(values)))[..., 0].tolist() == [[0, 117, 255, 1]]
    with pytest.raises(ValueError, match="grey values of 0 to 70000"):
        as_seen(Image.fromarray(np.array([[0, 70000]], np.int32)))
    with pytest.raises(ValueError, match="floating-point"):
        as_seen(Image.new("F", (1, 1)))


def test_grey_has_three_equal_channels() -> None:
    shades = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert grey(shades).shape == (2, 3, 3) and all(np.array_equal(grey(shades)[..., i], shades) for i in range(3))


@pytest.mark.parametrize(("side", "tile"), [(64, 192), (144, 144), (200, 200)])
def test_columns_enlarge_small_pictures_by_a_whole_factor(side: int, tile: int) -> None:
    columns = {label: [picture(side, row) for row in range(2)] for label in ("teacher", "student", "layout")}
    sheet = in_columns(columns)
    assert sheet.shape == (2 * (tile + 6) + 6 + 20, 3 * (tile + 6) + 6, 3)
    if side == tile:
        assert np.array_equal(sheet[20 : 20 + side, 6 : 6 + side], columns["teacher"][0])
        assert np.array_equal(sheet[20 + side + 6 :][:side, 6 : 6 + side], columns["teacher"][1])


def test_a_png_says_what_it_is_and_its_pixels_stay(tmp_path: Path) -> None:
    texts = {"prompt": "a sign that says \u201c\u8425\u4e1a\u4e2d\u201d", "seed": "7"}
    write_png(tmp_path / "a.png", picture(32, 0), texts)
    write_png(tmp_path / "b.png", picture(32, 0))
    with Image.open(tmp_path / "a.png") as image, Image.open(tmp_path / "b.png") as bare:
        assert image.text == texts and not bare.text  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(image), np.asarray(bare))
    with pytest.raises(UsageError, match=r"a\.jpg: received a \.jpg file, expected \.png"):
        write_png(tmp_path / "a.jpg", picture(32, 0))


def test_a_grid_has_rows_of_so_many() -> None:
    tiles = [picture(10, seed) for seed in range(3)]
    sheet = in_grid(tiles, columns=2)
    assert sheet.shape == (38, 38, 3)
    assert np.array_equal(sheet[6:16, 22:32], tiles[1]) and np.array_equal(sheet[22:32, 6:16], tiles[2])
    assert (sheet[22:32, 22:32] == 255).all()
