from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stage1_teacher.inputs.input import InputFailure
from stage1_teacher.rendering import images
from stage1_teacher.rendering.images import decode_image, read_image_file

GOLDEN = (Path(__file__).parents[2] / "golden" / "data" / "imgs" / "a.png").read_bytes()


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_common_formats_are_read_as_rgb_in_minus_one_to_one(kind: str, mode: str) -> None:
    if kind == "JPEG" and mode in ("P", "RGBA"):
        mode = "CMYK"
    values, size = decode_image(encode(Image.new("RGB", (40, 30), (255, 128, 0)).convert(mode), kind), 64, "x")
    assert size == (40, 30)
    assert values.shape == (3, 64, 64) and values.dtype == np.float32
    assert values.min() >= -1 and values.max() <= 1
    if mode == "RGB":
        assert values.mean((1, 2)) == pytest.approx([1, 0, -1], abs=0.03)


def test_an_image_lies_as_a_viewer_shows_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned to the left
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue(), 64, "x")[1] == (30, 40)
    values, _ = decode_image(encode(Image.fromarray(np.full((64, 64), 30000, np.uint16))), 64, "x")
    assert ((values + 1) * 127.5).round().max() == 117


def test_an_image_of_its_own_size_is_not_resampled() -> None:
    values, size = decode_image(GOLDEN, 512, "x")
    pixels = np.asarray(Image.open(io.BytesIO(GOLDEN)).convert("RGB"))
    assert size == (512, 512)
    assert np.array_equal(((values + 1) * 127.5).round().transpose(1, 2, 0), pixels)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_unpacked() -> None:
    for width, height in ((50_000, 50_000), (2**31 - 1, 1), (100_000, 1000)):
        with pytest.raises(InputFailure) as caught:
            decode_image(png_that_claims(width, height), 64, "x")
        assert caught.value.reason in ("image too large", "image unreadable")
    with pytest.raises(InputFailure, match="8200 x 8200 pixels, at most 67108864"):
        decode_image(png_that_claims(8200, 8200), 64, "x")


def test_a_huge_file_is_refused_without_reading_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputFailure, match=r"'huge\.png' has more than 256 MiB"):
        read_image_file(path, "x")
    with pytest.raises(InputFailure) as caught:
        read_image_file(tmp_path / "none.png", "x")
    assert caught.value.reason == "image missing"
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 3)
    (tmp_path / "three").write_bytes(b"abc")
    assert read_image_file(tmp_path / "three", "x") == b"abc"


def test_a_git_lfs_pointer_is_named() -> None:
    with pytest.raises(InputFailure, match=r"image is a git-lfs pointer; .* git lfs pull"):
        decode_image(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", 64, "x")


def test_formats_that_start_other_programs_are_not_read() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    with pytest.raises(InputFailure, match="image is no JPEG, PNG, WEBP, BMP file"):
        decode_image(postscript, 64, "x")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_an_image_or_a_failure_and_nothing_else(data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from([GOLDEN, encode(Image.new("RGB", (20, 20)), "JPEG")])))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    for attempt in (bytes(damaged), bytes(damaged[:cut])):
        try:
            values, _ = decode_image(attempt, 32, "x")
            assert values.shape == (3, 32, 32)
        except InputFailure as failure:
            assert "0x" not in str(failure)  # a memory address would change the record of failures
            assert "\n" not in str(failure)
