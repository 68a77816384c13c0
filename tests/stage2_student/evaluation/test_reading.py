from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from common.layouts import Layout, Line, palette_of
from stage2_student.evaluation.judges import Judge
from stage2_student.evaluation.reading import (
    LineResult,
    color_right,
    ground_difference,
    nearest_color,
    read_images,
    text_color,
)
from tests.stage2_student.evaluation.drawn_text import PALETTE, draw_layouts


def accuracy(judge: Judge, images: list[NDArray[np.uint8]], layouts: list[Layout]) -> float:
    results = read_images(judge, images, layouts)
    return float(np.mean([line.exact for lines in results for line in lines]))


@pytest.mark.parametrize(
    ("count", "side", "heights", "angles"),
    [
        pytest.param(50, 96, (14, 24), (0, 0), id="the embedded teacher's size"),
        pytest.param(50, 128, (14, 24), (-15, 15), id="slightly rotated"),
        pytest.param(50, 512, (24, 90), (-80, 80), id="the released model's size, any angle"),
        pytest.param(34, 256, (24, 48), (90, 90), id="running downwards"),
    ],
)
def test_true_images_of_known_text_are_read(
    judge: Judge, count: int, side: int, heights: tuple[int, int], angles: tuple[float, float]
) -> None:
    images, layouts = draw_layouts("read", count, side, heights, angles)
    assert accuracy(judge, images, layouts) >= 0.97


def test_upright_characters_one_below_the_other_are_read(judge: Judge) -> None:
    images, layouts = draw_layouts("stacked", 34, 384, (24, 48), stacked=True)
    assert accuracy(judge, images, layouts) >= 0.97


def test_shuffled_labels_score_near_zero(judge: Judge) -> None:
    images, layouts = draw_layouts("shuffled", 40, 96, (14, 24))
    others = layouts[1:] + layouts[:1]
    shuffled = [
        replace(layout, lines=(replace(layout.lines[0], text=other.lines[0].text),))
        for layout, other in zip(layouts, others, strict=True)
        if layout.lines[0].text != other.lines[0].text
    ]
    kept = [
        image
        for image, layout in zip(images, layouts, strict=True)
        if layout.layout_id in {x.layout_id for x in shuffled}
    ]
    assert len(shuffled) >= 30
    assert accuracy(judge, kept, shuffled) <= 0.02


def test_images_of_another_size_than_the_layout_are_read_at_their_own(judge: Judge) -> None:
    images, layouts = draw_layouts("resized", 10, 256, (30, 40))
    halved = [
        replace(
            layout,
            size=(128, 512),
            lines=(replace(layout.lines[0], polygon=tuple((x * 2, y / 2) for x, y in layout.lines[0].polygon)),),
        )
        for layout in layouts
    ]
    assert accuracy(judge, images, halved) == 1


def test_a_layout_without_lines_has_no_results(judge: Judge) -> None:
    images, layouts = draw_layouts("none", 2, 96, (16, 20))
    results = read_images(judge, images, [replace(layouts[0], lines=()), layouts[1]])
    assert [len(lines) for lines in results] == [0, 1]


def test_the_colour_of_drawn_text_is_found() -> None:
    images, layouts = draw_layouts("colours", 60, 96, (14, 24), (-15, 15))
    palette = palette_of(layouts)
    assert sorted(palette) == sorted(PALETTE)
    results = read_images(_Blind(), images, layouts)
    right = [color_right(line, palette) for lines in results for line in lines]
    assert np.mean([bool(value) for value in right]) >= 0.97


def test_a_wrong_colour_is_wrong_and_no_colour_asked_for_does_not_count() -> None:
    line = LineResult(
        text="A", read="A", confidence=1.0, height=20.0, color=(214, 36, 36), found_color=(40, 60, 220)
    )
    assert color_right(line, PALETTE) is False
    assert color_right(replace(line, found_color=(200, 60, 50)), PALETTE) is True
    assert color_right(replace(line, found_color=None), PALETTE) is False
    assert color_right(replace(line, color=None), PALETTE) is None
    assert color_right(line, []) is None


def test_one_flat_colour_has_no_text_colour() -> None:
    assert text_color(np.full((20, 60, 3), 128, np.uint8)) is None


def test_the_nearest_colour_is_the_one_that_looks_nearest() -> None:
    assert nearest_color((250, 230, 60), PALETTE) == PALETTE.index((244, 216, 40))


def test_arbitrary_colours_are_no_palette() -> None:
    _, layouts = draw_layouts("many", 40, 96, (16, 20))
    many = [
        replace(layout, lines=(replace(layout.lines[0], color=(float(i), 0.0, 0.0)),))
        for i, layout in enumerate(layouts)
    ]
    assert palette_of(many) == []
    assert palette_of([replace(layouts[0], lines=())]) == []


class _Blind:
    """A judge that cannot read; colours do not need one."""

    identity = "blind"

    def read(self, crops):  # type: ignore[no-untyped-def]
        from stage2_student.evaluation.judges import Reading

        return [Reading(text="", confidence=0.0) for _ in crops]


def test_the_ground_counts_outside_the_lines_only_and_at_the_drawn_images_size() -> None:
    box = ((10.0, 10.0), (50.0, 10.0), (50.0, 30.0), (10.0, 30.0))
    layout = Layout(layout_id="a", size=(64, 64), lines=(Line(text="x", polygon=box),))
    truth = np.full((64, 64, 3), 200, np.uint8)
    sampled = truth.copy()
    sampled[10:31, 10:51] = (255, 0, 0)
    assert ground_difference(sampled, truth, layout) == 0
    sampled[50:] = 0  # 14 of 64 rows; black is 80 from this grey in L*
    found = ground_difference(sampled, truth, layout)
    assert found is not None and 20 < found < 30
    assert ground_difference(np.repeat(np.repeat(sampled, 2, 0), 2, 1), truth, layout) == pytest.approx(
        found, rel=0.05
    )
    whole = Layout(
        layout_id="b", size=(64, 64), lines=(Line(text="x", polygon=((0, 0), (63, 0), (63, 63), (0, 63))),)
    )
    assert ground_difference(sampled, truth, whole) is None
