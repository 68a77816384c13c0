from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stage1_teacher.rendering import lines as rendering
from stage1_teacher.tiny.ground import KINDS, PALETTE, Ground, render_ground
from stage1_teacher.tiny.scene import (
    CAPITALS,
    DIGITS,
    FONT_FOLDER,
    FONTS,
    MIN_CONTRAST,
    SINGLE_LETTERS,
    SMALL,
    UNMAPPED_SHARE,
    Scene,
    draw_scene_plan,
    recolor,
    render_scene,
    text_mask,
)

LUMA = np.array([0.299, 0.587, 0.114])


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene_plan("test", index) for index in range(80)]


def _glyph_map(scene: Scene, index: int) -> np.ndarray:
    line = scene.lines[index]
    polygon = np.array(line.polygon, np.float32)
    size = (scene.size, scene.size)
    return rendering.render_glyph_map(line.text, polygon, FONT_FOLDER / line.font, line.color, size)


def _roughness(image: np.ndarray) -> float:
    return float(sum(np.square(np.diff(image, axis=axis)).sum() for axis in (0, 1)))


def test_the_same_seed_gives_the_same_scene_and_another_seed_another_one() -> None:
    assert draw_scene_plan("test", 3) == draw_scene_plan("test", 3)
    assert draw_scene_plan("test", 3) != draw_scene_plan("test", 4)
    assert np.array_equal(render_scene(draw_scene_plan("test", 3)), render_scene(draw_scene_plan("test", 3)))


def test_scenes_have_one_to_three_lines_of_one_to_eight_known_characters(scenes: list[Scene]) -> None:
    known = set(CAPITALS + SMALL + DIGITS)
    assert {len(scene.lines) for scene in scenes} == {1, 2, 3}
    lengths = {len(line.text) for scene in scenes for line in scene.lines}
    assert min(lengths) == 1 and max(lengths) == 8
    assert all(set(line.text) <= known for scene in scenes for line in scene.lines)


def test_their_share_of_the_single_letters_is_missing_from_the_glyph_map() -> None:
    scenes = [draw_scene_plan("test", index, lengths=SINGLE_LETTERS) for index in range(60)]
    singles = [line for scene in scenes for line in scene.lines]
    assert {len(line.text) for line in singles} == {1}
    missing = sum(not line.in_glyph_map for line in singles) / len(singles)
    assert missing == pytest.approx(UNMAPPED_SHARE, abs=0.1)
    for scene in scenes:
        said = scene.annotation("a.png")["annotations"]
        assert isinstance(said, list)
        assert [entry.get("glyph_map", True) for entry in said] == [line.in_glyph_map for line in scene.lines]
        assert all(
            line.in_glyph_map == other.in_glyph_map
            for line, other in zip(scene.lines, recolor(scene, 1).lines, strict=True)
        )


def test_longer_lines_are_in_the_glyph_map(scenes: list[Scene]) -> None:
    longer = [line for scene in scenes for line in scene.lines if len(line.text) > 1]
    assert len(longer) > 80 and all(line.in_glyph_map for line in longer)


def test_every_kind_of_ground_and_every_font_occurs(scenes: list[Scene]) -> None:
    assert {scene.ground.kind for scene in scenes} == set(KINDS)
    assert {line.font for scene in scenes for line in scene.lines} == set(FONTS)


def test_polygons_lie_in_the_image_and_lines_do_not_overlap(scenes: list[Scene]) -> None:
    for scene in scenes:
        masks = [rendering.render_mask(np.array(line.polygon, np.float32), (96, 96)) for line in scene.lines]
        assert all(0 <= value < 96 for line in scene.lines for point in line.polygon for value in point)
        assert np.sum(masks, axis=0).max() == 1


def test_letters_of_an_image_are_what_the_glyph_map_is_the_trace_of(scenes: list[Scene]) -> None:
    slanted = 0
    for scene in scenes:
        ground = render_scene(replace(scene, lines=()))
        for index, line in enumerate(scene.lines):
            rendered = (render_scene(replace(scene, lines=(line,))) != ground).any(-1)
            letters, glyphs = text_mask(line, scene.size), _glyph_map(scene, index)
            assert not rendered[letters == 0].any() and rendered[letters > 0.1].all()
            (_, top), (_, bottom) = line.polygon[:2]
            if top == bottom:  # to the pixel
                assert np.array_equal(glyphs, max(line.color) * letters >= 0.5)
            else:  # turned smoothly, where the map takes the nearest pixel
                slanted += 1
                assert (letters[glyphs == 0] > 0.5).sum() <= 0.05 * (letters > 0.5).sum()
                polygon, font = np.array(line.polygon, np.float32), FONT_FOLDER / line.font
                nearest = rendering.render_coverage(line.text, polygon, font, (scene.size, scene.size))
                assert letters.sum() == pytest.approx(nearest.sum(), rel=0.1)
                assert _roughness(letters) < 0.95 * _roughness(nearest)
    assert slanted > 5


def test_glyph_maps_do_not_spread_the_letters(scenes: list[Scene]) -> None:
    for scene in scenes:
        for line in scene.lines:
            box = rendering.fit_box(np.array(line.polygon, np.float32))
            font = rendering.largest_font(line.text, FONT_FOLDER / line.font, box)
            assert font is not None and rendering.spread(line.text, font, box) == line.text


def test_stripes_and_squares_lie_where_the_caption_alone_can_say() -> None:
    for kind, vertical in (("striped", True), ("striped", False), ("checked", False)):
        image = render_ground(Ground(kind=kind, colors=("red",), vertical=vertical), 96).astype(int)
        assert len(np.unique(image.reshape(-1, 3), axis=0)) == 2
        along, across = (image[0], image[:, 0]) if vertical else (image[:, 0], image[0])
        edges = np.flatnonzero(np.abs(np.diff(along, axis=0)).sum(-1)) + 1
        assert edges.tolist() == [16, 32, 48, 64, 80]
        assert (np.ptp(across, axis=0).max() > 0) == (kind == "checked")


def test_letters_moved_by_a_few_pixels_would_not_lie_under_the_glyph_map(scenes: list[Scene]) -> None:
    covered = []
    for scene in scenes:
        letters, glyphs = text_mask(scene.lines[0], scene.size) > 0.5, _glyph_map(scene, 0)
        covered.append((np.roll(letters, 4, axis=1) & (glyphs > 0)).sum() / max(letters.sum(), 1))
    assert np.mean(covered) < 0.6


def test_text_stands_out_from_its_ground(scenes: list[Scene]) -> None:
    for scene in scenes:
        image = render_scene(scene).astype(float) @ LUMA
        for line in scene.lines:
            inside = rendering.render_mask(np.array(line.polygon, np.float32), (96, 96)) > 0
            ground = image[inside & (text_mask(line, 96) < 0.01)]
            difference = abs(float(np.dot(line.color, LUMA)) - float(np.median(ground)))
            assert difference > MIN_CONTRAST - 20, (scene, line)


def test_a_recoloured_scene_keeps_its_text_and_changes_its_look(scenes: list[Scene]) -> None:
    changed = 0
    for scene in scenes[:20]:
        other = recolor(scene, 1)
        assert [(line.text, line.polygon, line.font) for line in other.lines] == [
            (line.text, line.polygon, line.font) for line in scene.lines
        ]
        changed += other.ground != scene.ground
    assert changed > 15


def test_captions_say_the_ground_and_never_the_text_or_its_colour() -> None:
    ground = Ground(kind="gradient", colors=("orange", "red"), vertical=True)
    assert ground.caption == "an orange to red gradient from top to bottom"
    assert Ground(kind="checked", colors=("blue",), vertical=False).caption == "a checked blue background"
    striped = Ground(kind="striped", colors=("pink",), vertical=True)
    assert striped.caption == "a striped pink background, vertical stripes"


def test_palette_colours_are_far_apart() -> None:
    colors = np.array(list(PALETTE.values()), float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=2) + 1e3 * np.eye(len(colors))
    assert distances.min() > 80
