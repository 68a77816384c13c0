from __future__ import annotations

import numpy as np
import pytest

from stage2_student.evaluation.crops import cut_line, ink_mask, line_height, text_quad, unstack, warp

BOX = [(10.0, 20.0), (70.0, 20.0), (70.0, 40.0), (10.0, 40.0)]


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("direction", [1, -1])
def test_a_box_is_found_whatever_corner_it_begins_at_and_way_it_runs(start: int, direction: int) -> None:
    polygon = (BOX[start:] + BOX[:start])[::direction]
    np.testing.assert_allclose(text_quad(polygon), BOX)


def test_a_polygon_of_many_points_becomes_its_smallest_rectangle() -> None:
    polygon = [*BOX, (10, 30), (40, 20), (55, 40)]
    np.testing.assert_allclose(text_quad(polygon), BOX, atol=0.1)


def test_the_height_is_across_the_line_also_when_it_is_turned() -> None:
    turned = [(y, x) for x, y in BOX]
    assert line_height(BOX) == pytest.approx(20)
    assert line_height(turned) == pytest.approx(20)


def test_perspective_is_undone() -> None:
    quad = np.array([[10, 10], [80, 30], [80, 50], [10, 60]], np.float32)
    image = np.zeros((80, 100, 3), np.uint8)
    rows, columns = np.mgrid[0:80, 0:100]
    top, bottom = 10 + (columns - 10) * 20 / 70, 60 - (columns - 10) * 10 / 70
    image[(rows >= top) & (rows <= (top + bottom) / 2)] = 255
    crop = warp(image, quad, margin=0)[:, 5:-5, 0].astype(float)
    height = len(crop)
    assert crop[: height // 2 - 3].mean() > 240
    assert crop[height // 2 + 3 :].mean() < 15


def test_a_line_below_sixty_degrees_has_one_candidate_and_a_vertical_one_three() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    assert len(cut_line(image, BOX)) == 1
    assert len(cut_line(image, [(40, 10), (60, 10), (60, 90), (40, 90)])) == 3
    steep = [(30.0, 10.0), (50.0, 4.0), (74.0, 84.0), (54.0, 90.0)]
    assert len(cut_line(image, steep)) == 2


def test_a_box_as_high_as_wide_may_hold_stacked_characters_and_a_wider_one_may_not() -> None:
    image = np.zeros((100, 200, 3), np.uint8)

    def candidates(width: int, height: int) -> int:
        return len(cut_line(image, [(10, 10), (10 + width, 10), (10 + width, 10 + height), (10, 10 + height)]))

    assert candidates(60, 55) == 1
    assert candidates(60, 60) == 2
    assert candidates(60, 70) == 2


def test_a_polygon_that_leaves_the_image_is_cut_with_the_edge_repeated() -> None:
    image = np.full((32, 32, 3), 77, np.uint8)
    (crop,) = cut_line(image, [(-20, 10), (60, 10), (60, 30), (-20, 30)])
    assert (crop == 77).all()


def test_a_degenerate_polygon_still_gives_a_crop() -> None:
    crops = cut_line(np.zeros((32, 32, 3), np.uint8), [(5, 5), (20, 5), (10, 5)])
    assert all(crop.size for crop in crops)


def test_parts_of_a_character_stay_together_when_a_column_is_laid_out() -> None:
    column = np.zeros((100, 24, 3), np.uint8)
    column[4:8, 10:14] = 255  # the dot of an i
    column[11:22, 10:14] = 255  # its stem
    column[30:52, 2:22] = 255
    column[60:82, 2:22] = 255
    ink = ink_mask(unstack(column)).any(axis=0)
    starts = int((np.diff(np.append(False, ink).astype(int)) == 1).sum())
    assert starts == 3


def test_a_blank_column_is_left_as_it_is() -> None:
    column = np.full((60, 20, 3), 9, np.uint8)
    assert unstack(column) is column
