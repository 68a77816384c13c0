from __future__ import annotations

from dataclasses import replace

import pytest

from stage1_teacher.inputs.input import FontLacksCharacters
from stage1_teacher.rendering.legibility import find_doubts
from tests.stage1_teacher.rendering.test_rendered_input import SETTINGS, content, corners, line


def test_what_can_be_seen_raises_no_doubt() -> None:
    beside = line("24H", polygon=corners(10, 40, 118, 70))  # shares an edge
    within = line("A", polygon=corners(0, 90, 128, 128))  # up to the edge
    assert find_doubts(content(line(), beside, within), SETTINGS, 8) == []
    assert find_doubts(content(), SETTINGS, 8) == []


def test_letters_that_are_too_small_for_the_vae_are_named() -> None:
    small = line("WELCOME TO ALL", polygon=corners(10, 10, 70, 22))
    (doubt,) = find_doubts(content(small), SETTINGS, 8)
    assert doubt.startswith("text 'WELCOME TO ALL' fits its box at 6 pixels' height and cannot be read below 16")
    assert find_doubts(content(small), SETTINGS, 2) == []
    (doubt,) = find_doubts(content(line("WELCOME TO ALL", polygon=corners(10, 10, 14, 13))), SETTINGS, 2)
    assert "fits its box at 0 pixels' height" in doubt
    # In the frame's own pixels: 256 to 128.
    assert find_doubts(content(line(polygon=corners(20, 20, 76, 50)), frame=(256, 256)), SETTINGS, 8)


def test_boxes_that_the_edge_cuts_and_that_overlap_are_named() -> None:
    cut = line("CUT", polygon=corners(60, 90, 140, 120))
    (doubt,) = find_doubts(content(line(), cut), SETTINGS, 8)
    assert doubt == "the box of 'CUT' is cut by the edge of the image of 128 x 128 pixels; put all of it inside"
    over = line("OVER", polygon=corners(10, 35, 118, 70))
    (doubt,) = find_doubts(content(line(), over), SETTINGS, 8)
    assert doubt == "the boxes of 'OPEN' and 'OVER' overlap by 540 pixels; move one of them"


def test_what_is_left_out_is_named() -> None:
    settings = replace(SETTINGS, max_lines=1, max_chars=3)
    many = content(line("ABC"), line("DEFGH", polygon=corners(10, 50, 118, 90)))
    fewer, cut = find_doubts(many, settings, 2)
    assert fewer.startswith("2 texts, of which inputs.max_lines = 1 are rendered, chosen by chance")
    assert cut.startswith("text 'DEFGH' is cut to 'DEF': inputs.max_chars = 3")
    with pytest.raises(FontLacksCharacters):
        find_doubts(content(line("咖啡")), SETTINGS, 8)
