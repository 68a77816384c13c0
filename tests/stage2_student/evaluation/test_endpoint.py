from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from common.regions import text_cells
from stage2_student.evaluation.endpoint import endpoint_error, psnr, square_errors


def test_a_cell_holds_text_if_any_pixel_of_a_line_falls_into_it() -> None:
    positions = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    positions[0, 0, 3, 4] = 2  # two lines cover one pixel of the cell in row 0, column 1
    assert text_cells(positions, (2, 2)).tolist() == [[[[0, 1], [0, 0]]]]


def test_square_errors_are_those_worked_out_by_hand_inside_outside_and_whole() -> None:
    solved = torch.zeros(2, 2, 1, 2)
    latents = torch.tensor([[[[3.0, 1.0]], [[1.0, 1.0]]], [[[2.0, 0.0]], [[0.0, 0.0]]]])
    cells = torch.tensor([[[[1, 0]]], [[[0, 0]]]], dtype=torch.uint8)
    first, second = square_errors(latents.half(), solved, cells)
    # Cell 0 has the differences 3 and 1, cell 1 has 1 and 1; the second image has no text.
    assert (first.inside, first.outside, first.whole) == (5.0, 1.0, 3.0)
    assert (second.inside, second.outside, second.whole) == (None, 1.0, 1.0)
    (all_text,) = square_errors(latents[:1], solved[:1], torch.ones(1, 1, 1, 2))
    assert (all_text.inside, all_text.outside) == (3.0, None)
    assert endpoint_error(latents, solved) == pytest.approx(math.sqrt(2))


def test_equal_latents_are_0_apart_and_half_floats_are_compared_as_they_are() -> None:
    latents = torch.randn(3, 4, 5, 6)
    assert endpoint_error(latents, latents) == 0
    rounding = endpoint_error(latents, latents.half())
    assert 1e-5 < rounding < 1e-3


def test_psnr_is_of_the_8_bit_range() -> None:
    black = np.zeros((2, 2, 3), np.uint8)
    assert psnr(np.full_like(black, 255), black) == pytest.approx(0)
    assert psnr(np.full_like(black, 1), black) == pytest.approx(20 * math.log10(255))
    one_value = black.copy()
    one_value[0, 0, 0] = 51  # a fifth of the range in one of 12 values
    assert psnr(one_value, black) == psnr(black, one_value) == pytest.approx(10 * math.log10(25 * 12))


def test_equal_images_have_no_psnr() -> None:
    assert psnr(np.ones((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)) is None
