from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UsageError
from common.pictures import Picture, beside, grey, in_columns, in_grid, write_png


def picture(side: int, seed: int) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def test_pictures_stand_side_by_side_and_are_written_as_png(tmp_path: Path) -> None:
    both = beside([picture(32, 0), picture(32, 1)], gap=2)
    assert both.shape == (32, 66, 3) and (both[:, 32:34] == 255).all()
    write_png(tmp_path / "new" / "a.png", both)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), both)


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
