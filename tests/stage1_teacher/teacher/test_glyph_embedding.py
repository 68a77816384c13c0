from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from common.anytext2.config import NetworkConfig
from stage1_teacher.teacher.font_crop import crop_along_line, line_box, similarity
from stage1_teacher.teacher.glyph_embedding import GlyphEmbedding, font_lines
from stage1_teacher.teacher.recognizer import load_recognizer

MODELS = Path(__file__).parents[3] / "models"


def polygon_mask(points: list[tuple[int, int]], size: int = 128) -> Tensor:
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [np.array(points)], 1)
    return torch.from_numpy(mask)


def test_a_level_line_is_cut_out_as_it_is() -> None:
    image = torch.stack([torch.arange(128.0).expand(128, 128), torch.arange(128.0)[:, None].expand(128, 128)])
    crop = crop_along_line(image, polygon_mask([(20, 30), (80, 30), (80, 50), (20, 50)]))
    assert crop.shape == (2, 20, 60)
    # Each pixel holds its own place; upstream's sampling is up to one pixel off.
    torch.testing.assert_close(crop, image[:, 30:50, 20:80], rtol=0, atol=1.0)


def test_a_tilted_line_is_turned_upright() -> None:
    """The left half of the line is dark and the right half bright; upright, the border is a column."""
    corners = [(30, 40), (100, 75), (91, 93), (21, 58)]
    bright = polygon_mask([(65, 57), (100, 75), (91, 93), (56, 75)])
    crop = crop_along_line(255.0 * bright[None], polygon_mask(corners))
    assert crop.shape[1] < crop.shape[2] / 3
    middle = crop[0, 5:-5]
    assert float(middle[:, : crop.shape[2] // 2 - 6].max()) < 30
    assert float(middle[:, crop.shape[2] // 2 + 6 : -6].min()) > 225


def test_an_empty_mask_takes_the_fallback_corner() -> None:
    image = torch.arange(128.0).expand(1, 128, 128)
    crop = crop_along_line(image, torch.zeros(128, 128))
    assert crop.shape == (1, 100, 100)
    torch.testing.assert_close(crop, image[:, :100, :100], rtol=0, atol=1.0)


@pytest.mark.parametrize(
    "points", [[(5, 5), (5, 5), (5, 5)], [(5, 5), (90, 5), (90, 5)], [(7, 3), (7, 90), (7, 90)]]
)
def test_a_line_without_area_still_gives_pixels(points: list[tuple[int, int]]) -> None:
    crop = crop_along_line(torch.rand(1, 128, 128), polygon_mask(points))
    assert min(crop.shape) >= 1
    assert bool(crop.isfinite().all())


def test_the_box_of_the_largest_blob_starts_at_its_top_left() -> None:
    mask = polygon_mask([(20, 30), (80, 30), (80, 50), (20, 50)]).numpy()
    mask[100:103, 100:103] = 1
    assert line_box(mask).tolist() == [[20, 30], [80, 30], [80, 50], [20, 50]]


def test_a_similarity_is_found_again_from_its_points() -> None:
    source = np.array([[0, 0], [4, 0], [4, 2], [0, 2]], dtype=float)
    turn = 1.5 * np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    found = similarity(source, source @ turn.T + [3, -1])
    np.testing.assert_allclose(found[:2, :2], turn, atol=1e-12)
    np.testing.assert_allclose(found[:2, 2], [3, -1], atol=1e-12)


def test_each_of_the_four_encodings_moves_the_embedding_and_lines_are_independent() -> None:
    torch.manual_seed(0)
    network = GlyphEmbedding(16).eval()
    # Only a trained recognizer tells fonts apart; through random weights nothing gets to the end.
    weights = MODELS / "tiny" / "recognizer.safetensors"
    network.font_predictor = load_recognizer(NetworkConfig.sd15(), weights)
    masks = torch.stack([polygon_mask([(20, 30), (80, 30), (80, 50), (20, 50)])] * 2)[:, None]
    given = {
        "glyph_features": torch.randn(2, 40, 64),
        "positions": masks.float(),
        "font_lines": font_lines(torch.rand(1, 128, 128), masks),
        "colors": torch.tensor([[10.0, 20, 30], [500, 500, 500]]),
    }
    first = network(**given)
    assert first.shape == (2, 16)
    for name in given:
        changed = dict(given)
        changed[name] = given[name].clone()
        changed[name][1] = 0
        second = network(**changed)
        torch.testing.assert_close(second[0], first[0])
        assert not torch.allclose(second[1], first[1], rtol=1e-6, atol=1e-6), name
