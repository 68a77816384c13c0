from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stage1_teacher.rendering import lines as rendering
from stage1_teacher.tiny import scene as scenes_module
from stage1_teacher.tiny.ground import (
    CHANCE,
    CHANCE_KINDS,
    CLOUD_SIZE,
    GRAIN_SIZE,
    KINDS,
    PALETTE,
    SOFT_SHAPES,
    SPOT_RADII,
    SPOTS,
    TOLD,
    TOLD_KINDS,
    Ground,
    draw_ground_plan,
    render_ground,
    smooth_noise,
)
from stage1_teacher.tiny.scene import (
    CAPITALS,
    DIGITS,
    FONT_FOLDER,
    FONTS,
    MAX_LEAN,
    MIN_CONTRAST,
    SINGLE_LETTERS,
    SMALL,
    UNMAPPED_SHARE,
    UNTOLD_FONT,
    Line,
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


@pytest.fixture(scope="module")
def many_lines() -> list[Line]:
    """Lines of many scenes."""
    return [line for index in range(120) for line in draw_scene_plan("untold", index, world=CHANCE).lines]


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


def test_a_small_share_of_the_lines_in_the_map_has_an_untold_font_and_leans_either_way(
    many_lines: list[Line],
) -> None:
    untold = [line for line in many_lines if not line.told]
    shown = sum(line.in_glyph_map for line in many_lines)
    assert len(untold) / shown == pytest.approx(CHANCE.untold_share, abs=0.06)
    assert all(line.in_glyph_map and abs(line.lean) <= MAX_LEAN for line in untold)
    assert min(line.lean for line in untold) < -MAX_LEAN / 2 and max(line.lean for line in untold) > MAX_LEAN / 2
    assert len({line.font for line in untold}) > 2 and {line.map_font for line in untold} == {UNTOLD_FONT}
    assert all(line.lean == 0 and line.map_font == line.font for line in many_lines if line.told)


def test_an_annotation_names_the_fonts_that_are_told_and_no_others() -> None:
    scene = next(
        scene
        for scene in (draw_scene_plan("untold", index, world=CHANCE) for index in range(250))
        if {line.told for line in scene.lines} == {True, False}
    )
    entries = scene.annotation("a.png")["annotations"]
    assert isinstance(entries, list)
    assert [entry.get("font") for entry in entries] == [
        line.font.partition(".")[0] if line.told else None for line in scene.lines
    ]


def test_letters_lean_along_their_line_and_stay_where_they_are_at_its_middle(many_lines: list[Line]) -> None:
    for line in [line for line in many_lines if abs(line.lean) > 0.1][:6]:
        upright, leaning = (text_mask(replace(line, lean=lean), 96) for lean in (0.0, line.lean))
        corners = np.array(line.polygon, float)
        along = (corners[1] - corners[0]) / np.linalg.norm(corners[1] - corners[0])
        above = np.array([along[1], -along[0]])
        places = np.argwhere(upright >= 0)[:, ::-1] - corners.mean(0)  # (x, y) from the line's middle
        moved = []
        for side in (1, -1):
            half = (side * (places @ above) > 0).reshape(96, 96)
            means = [
                (mask * half).flatten() @ (places @ along) / (mask * half).sum() for mask in (upright, leaning)
            ]
            moved.append(means[1] - means[0])
        assert moved[0] * line.lean > 0 > moved[1] * line.lean
        assert leaning.sum() == pytest.approx(upright.sum(), rel=0.1)


def test_every_kind_of_ground_and_every_font_occurs(scenes: list[Scene]) -> None:
    assert {scene.ground.kind for scene in scenes} == set(TOLD_KINDS)
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
            if not line.told:
                continue
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


def test_in_the_told_world_nothing_is_left_to_chance_and_recoloured_scenes_stay_in_their_world() -> None:
    told = [draw_scene_plan("world", index) for index in range(30)]
    chance = [draw_scene_plan("world", index, world=CHANCE) for index in range(30)]
    for scenes_, kinds in ((told, TOLD_KINDS), (chance, KINDS)):
        grounds = [recolor(scene, variant).ground for scene in scenes_ for variant in (1, 2)]
        assert {ground.kind for ground in grounds} <= set(kinds)
    assert all(line.told for scene in told for line in scene.lines)
    assert sum(recolor(scene, 1).ground.kind in CHANCE_KINDS for scene in chance) > 10


def test_most_grounds_leave_to_chance_where_things_lie() -> None:
    drawn = [draw_ground_plan(scenes_module.rng("grounds", index), CHANCE) for index in range(600)]
    for kind, share in zip(KINDS, CHANCE.shares, strict=True):
        assert sum(ground.kind == kind for ground in drawn) / 600 == pytest.approx(share, abs=0.06)
    for kind, (least, most) in (("spots", SPOTS), ("soft", SOFT_SHAPES)):
        assert {len(ground.shapes) for ground in drawn if ground.kind == kind} == set(range(least, most + 1))
    radii = [radius for ground in drawn if ground.kind == "spots" for _, _, radius in ground.shapes]
    assert SPOT_RADII[0] <= min(radii) < 0.1 and 0.18 < max(radii) <= SPOT_RADII[1]
    assert {ground.angle // 90 for ground in drawn if ground.kind == "turned"} == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", CHANCE_KINDS)
def test_a_caption_tells_kind_and_colours_and_not_what_is_left_to_chance(kind: str) -> None:
    drawn = [draw_ground_plan(scenes_module.rng("chance", index), CHANCE) for index in range(400)]
    first, second = [ground for ground in drawn if ground.kind == kind][:2]
    other = replace(second, colors=first.colors)
    assert other.caption == first.caption
    assert all(color in first.caption for color in first.colors)
    assert not np.array_equal(render_ground(other, 96), render_ground(first, 96))
    low, high = (np.array(PALETTE[color], float) for color in first.colors)
    pixels = render_ground(first, 96).reshape(-1, 3) - low
    mix = pixels @ (high - low) / ((high - low) @ (high - low))
    assert np.abs(pixels - mix[:, None] * (high - low)).max() < 1 and -0.01 < mix.min() < 0.2 < mix.max() < 1.01


def test_spots_lie_where_they_are_planned_with_an_edge_of_a_pixel() -> None:
    ground = Ground(
        kind="spots", colors=("yellow", "cyan"), vertical=False, shapes=((0.25, 0.5, 0.1), (0.75, 0.5, 0.2))
    )
    image = render_ground(ground, 96).astype(int)
    cyan = np.abs(image - PALETTE["cyan"]).max(-1) == 0
    yellow = np.abs(image - PALETTE["yellow"]).max(-1) == 0
    assert cyan[48, 24] and cyan[48, 72] and yellow[48, 48] and yellow[4, 4]
    assert cyan.sum() == pytest.approx(np.pi * (9.6**2 + 19.2**2), rel=0.1)
    assert 96**2 - cyan.sum() - yellow.sum() < 4 * np.pi * (9.6 + 19.2)
    soft = render_ground(replace(ground, kind="soft"), 96).astype(int)
    assert np.abs(np.diff(soft, axis=1)).max() < 40 < np.abs(np.diff(image, axis=1)).max()


def test_a_turned_gradient_runs_from_one_side_to_the_other_along_its_angle() -> None:
    def luma(angle: float) -> np.ndarray:
        return (
            render_ground(Ground(kind="turned", colors=("black", "white"), vertical=False, angle=angle), 96) @ LUMA
        )

    assert np.ptp(luma(0), axis=0).max() < 1 and np.ptp(luma(90), axis=1).max() < 1
    assert luma(0)[0, 0] < 20 and luma(0)[0, -1] > 235
    assert luma(180)[0, 0] > 235 and luma(90)[0, 0] < 20 and luma(90)[-1, 0] > 235
    assert luma(45)[0, 0] < 20 and luma(45)[-1, -1] > 235 and luma(45)[0, -1] == pytest.approx(128, abs=2)


def test_a_ground_under_which_no_colour_can_be_read_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    unreadable = Ground(kind="gradient", colors=("black", "white"), vertical=False)
    plain = Ground(kind="plain", colors=("red",), vertical=False)
    grounds = iter([unreadable, unreadable, plain])
    monkeypatch.setattr(scenes_module, "draw_ground_plan", lambda *_: next(grounds))
    scene = draw_scene_plan("unreadable", world=CHANCE, lengths=(0, 0, 0, 0, 0, 0, 0, 1))
    assert scene.ground == plain and scene.lines and next(grounds, None) is None


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
    spots = Ground(kind="spots", colors=("yellow", "cyan"), vertical=False, shapes=((0.5, 0.5, 0.1),))
    assert spots.caption == "a yellow background with cyan spots"
    assert replace(spots, kind="soft").caption == "a yellow background with soft cyan shapes"
    assert Ground(kind="turned", colors=("orange", "red"), vertical=False).caption == "an orange to red gradient"
    striped = Ground(kind="striped", colors=("pink",), vertical=True)
    assert striped.caption == "a striped pink background, vertical stripes"


def test_palette_colours_are_far_apart() -> None:
    colors = np.array(list(PALETTE.values()), float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=2) + 1e3 * np.eye(len(colors))
    assert distances.min() > 80


@pytest.mark.parametrize(("spread", "deviation"), [(CLOUD_SIZE, CHANCE.clouds), (GRAIN_SIZE, CHANCE.grain)])
def test_noise_has_the_size_and_the_smoothness_that_were_asked_for(spread: float, deviation: float) -> None:
    noise = smooth_noise(96, spread, deviation, "test", 1)
    assert noise.shape == (96, 96, 1) and noise.std() == pytest.approx(deviation, rel=1e-4)
    assert np.array_equal(noise, smooth_noise(96, spread, deviation, "test", 1))
    assert not np.array_equal(noise, smooth_noise(96, spread, deviation, "test", 2))
    # White noise smoothed by a Gaussian of deviation s has the correlation exp(-1 / (4 s^2)) from pixel to pixel.
    beside = np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]
    assert beside == pytest.approx(np.exp(-1 / (4 * spread**2)), abs=0.08)


def test_clouds_lie_behind_the_text_and_grain_over_all() -> None:
    scene = draw_scene_plan("noise", 3, world=CHANCE)
    plain = render_scene(replace(scene, world=TOLD)).astype(float)
    clouded = render_scene(replace(scene, world=replace(CHANCE, grain=0.0))).astype(float)
    grainy = render_scene(replace(scene, world=replace(CHANCE, clouds=0.0))).astype(float)
    text = np.max([text_mask(line, scene.size) for line in scene.lines], axis=0) > 0.999
    ground = np.max([text_mask(line, scene.size) for line in scene.lines], axis=0) == 0
    assert text.sum() > 30
    assert np.abs(clouded - plain)[text].max() <= 1 and np.abs(clouded - plain)[ground].mean() > 4
    assert np.abs(grainy - plain)[text].mean() > 0.8 and np.abs(grainy - plain)[ground].mean() > 0.8
