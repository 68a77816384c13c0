from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import DataError, UsageError
from stage1_teacher.inputs.files import open_inputs
from stage1_teacher.measuring.ablations import ABLATIONS, split_parts
from stage1_teacher.measuring.held_out import HeldOut, image_stem, read_undrawn
from stage1_teacher.measuring.teacher_sampler import teacher_samplers
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.teacher import Teacher
from stage1_teacher.tiny.data import write_scene
from stage1_teacher.tiny.scene import draw_scene_plan
from tests.stage1_teacher.small_teacher import (
    DATA,
    ROOT,
    annotation,
    load,
    write_annotations,
    write_prompts,
    write_teacher,
)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("held_out"))


def held_out_of(config_path: Path, annotations: Path, count: int = 10, *overrides: str) -> HeldOut:
    config = load(config_path, *overrides)
    settings = RenderSettings.from_config(config)
    return HeldOut(open_inputs([annotations], [], config.inputs, settings.fonts), settings, count)


def test_layouts_say_what_is_drawn_in_pixels_of_the_image(config_path: Path, tmp_path: Path) -> None:
    line = {
        "polygon": [[60, 75], [436, 75], [436, 165], [60, 165]],
        "text": "OPEN until late at night",
        "color": [1, 2, 3],
    }
    annotations = write_annotations(tmp_path / "a.json", annotation(0, annotations=[line]), annotation(1))
    held_out = held_out_of(config_path, annotations)
    coloured, plain = held_out.layouts
    assert [line.text for line in coloured.lines] == ["OPEN until late at n"]
    assert [line.color for line in coloured.lines] == [(1.0, 2.0, 3.0)]
    assert [line.color for line in plain.lines] == [None]
    assert coloured.size == (64, 64)
    ground = held_out.true_ground(coloured.layout_id)
    assert ground is not None and np.array_equal(ground, held_out.true_image(coloured.layout_id))
    assert coloured.name == "a"
    width = Image.open(DATA / "imgs" / "a.png").width
    np.testing.assert_allclose(
        np.array(coloured.lines[0].polygon)[:, 0], np.array([60, 436, 436, 60]) * 64 / width
    )


def test_a_text_that_is_cut_at_a_space_is_asked_for_without_it(config_path: Path, tmp_path: Path) -> None:
    line = {"polygon": [[60, 75], [436, 75], [436, 165], [60, 165]], "text": "Hello world this is long"}
    annotations = write_annotations(tmp_path / "a.json", annotation(0, annotations=[line]))
    (layout,) = held_out_of(config_path, annotations).layouts
    assert [line.text for line in layout.lines] == ["Hello world this is"]


def test_layouts_say_which_lines_the_glyph_map_shows(config_path: Path, tmp_path: Path) -> None:
    first = {"polygon": [[60, 75], [436, 75], [436, 165], [60, 165]], "text": "A"}
    second = {"polygon": [[60, 175], [436, 175], [436, 265], [60, 265]], "text": "B"}
    lines = [{**first, "glyph_map": False}, second]
    annotations = write_annotations(tmp_path / "a.json", annotation(0, annotations=lines))
    (layout,) = held_out_of(config_path, annotations).layouts
    assert [(line.text, line.in_glyph_map) for line in layout.lines] == [("A", False), ("B", True)]


def test_an_image_without_text_asks_for_no_line(config_path: Path, tmp_path: Path) -> None:
    annotations = write_annotations(tmp_path / "a.json", annotation(0, annotations=[]))
    (layout,) = held_out_of(config_path, annotations).layouts
    assert layout.lines == ()


def test_copies_and_failures_are_left_out_and_the_first_usable_ones_taken(
    config_path: Path, tmp_path: Path
) -> None:
    entries = [annotation(0), annotation(0), annotation(1, img_name="missing.png"), annotation(2), annotation(3)]
    held_out = held_out_of(config_path, write_annotations(tmp_path / "a.json", *entries), 2)
    assert [layout.caption for layout in held_out.layouts] == ["sign 0", "sign 2"]
    assert len(held_out.failures) == 1
    with pytest.raises(DataError, match=r"none of 1 inputs can be used; the first: .*missing.png"):
        held_out_of(config_path, write_annotations(tmp_path / "b.json", entries[2]))


def test_the_true_image_is_the_file_at_the_drawn_size_and_prompts_have_none(
    config_path: Path, tmp_path: Path
) -> None:
    held_out = held_out_of(config_path, write_annotations(tmp_path / "a.json", annotation(0)))
    image = held_out.true_image(held_out.layouts[0].layout_id)
    assert image.shape == (64, 64, 3)
    file = np.asarray(Image.open(DATA / "imgs" / "a.png").convert("RGB"), float)
    assert abs(image.mean() - file.mean()) < 3
    config = load(config_path)
    settings = RenderSettings.from_config(config)
    prompts = open_inputs([], [write_prompts(tmp_path / "p.jsonl", 1)], config.inputs, settings.fonts)
    without = HeldOut(prompts, settings, 1)
    with pytest.raises(UsageError, match="there is no true image"):
        without.true_image(without.layouts[0].layout_id)


def test_encoding_is_kept_and_does_not_depend_on_what_was_asked_for_before(
    config_path: Path, tmp_path: Path
) -> None:
    annotations = write_annotations(tmp_path / "a.json", *map(annotation, range(3)))
    held_out = held_out_of(config_path, annotations)
    teacher = Teacher.load(load(config_path))
    a, b, c = (layout.layout_id for layout in held_out.layouts)
    first = held_out.encode(teacher, [a, b])
    again = held_out.encode(teacher, [c, b, a, a])
    assert again[1] is first[1] and again[2] is first[0] and again[3] is first[0]
    fresh = held_out_of(config_path, annotations).encode(teacher, [c])[0]
    torch.testing.assert_close(again[0].text_context, fresh.text_context, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["caption", "color"])
def test_leaving_a_part_out_changes_its_context_and_the_other_not(
    config_path: Path, tmp_path: Path, part: str
) -> None:
    line = {**annotation(0)["annotations"][0], "color": [200, 10, 10]}
    held_out = held_out_of(config_path, write_annotations(tmp_path / "a.json", annotation(0, annotations=[line])))
    teacher = Teacher.load(load(config_path))
    ids = [held_out.layouts[0].layout_id]
    (whole,), (ablated,) = held_out.encode(teacher, ids), held_out.encode(teacher, ids, part)
    changed, kept = ("image_context", "text_context") if part == "caption" else ("text_context", "image_context")
    assert not torch.equal(getattr(whole, changed), getattr(ablated, changed))
    torch.testing.assert_close(getattr(whole, kept), getattr(ablated, kept))


def test_without_glyph_embedding_no_line_is_shown_to_the_recogniser(config_path: Path, tmp_path: Path) -> None:
    held_out = held_out_of(config_path, write_annotations(tmp_path / "a.json", annotation(0)))
    rendered = held_out.render(held_out.layouts[0].layout_id)
    ablated = ABLATIONS["glyph-embedding"](rendered)
    assert rendered.glyph_lines.any() and not ablated.glyph_lines.any() and not ablated.font_hint.any()
    assert torch.equal(rendered.glyphs, ablated.glyphs) and torch.equal(rendered.positions, ablated.positions)


def test_parts_are_left_out_alone_or_together(config_path: Path, tmp_path: Path) -> None:
    held_out = held_out_of(config_path, write_annotations(tmp_path / "a.json", annotation(0)))
    teacher, ids = Teacher.load(load(config_path)), [held_out.layouts[0].layout_id]
    names = ("", "glyph-map", "glyph-embedding", "glyph-map+glyph-embedding")
    whole, no_map, no_embedding, neither = (held_out.encode(teacher, ids, name)[0] for name in names)
    assert bool(whole.glyphs.any()) and not bool(no_map.glyphs.any()) and not bool(neither.glyphs.any())
    assert torch.equal(no_map.text_context, whole.text_context)
    assert torch.equal(neither.text_context, no_embedding.text_context)
    assert not torch.equal(neither.text_context, whole.text_context)
    assert torch.equal(no_embedding.glyphs, whole.glyphs)


def test_every_part_left_out_changes_what_the_embedded_teacher_draws(tmp_path: Path) -> None:
    scenes = (draw_scene_plan("test", index) for index in range(99))
    scene = next(scene for scene in scenes if {line.in_glyph_map for line in scene.lines} == {True, False})
    (tmp_path / "imgs").mkdir()
    entry = write_scene(tmp_path, scene, "a.png")
    (tmp_path / "a.json").write_text(json.dumps({"data_root": "imgs", "data_list": [entry]}))
    config = load(ROOT / "configs" / "tiny.toml", "inputs.edit_fraction=0")
    held_out = held_out_of(ROOT / "configs" / "tiny.toml", tmp_path / "a.json", 1, "inputs.edit_fraction=0")
    teacher, ids = Teacher.load(config), [held_out.layouts[0].layout_id]
    parts = [*ABLATIONS, "attnx+writenet", "glyph-embedding+caption"]
    samplers = teacher_samplers(config, held_out, lambda: (teacher, teacher.unconditional()), [], parts)
    noise = torch.randn(1, 1, 16, 24, 24, generator=torch.Generator().manual_seed(0))
    latents = {sampler.label: sampler.latents(sampler.prepare(ids), noise) for sampler in samplers}
    assert len(latents) == len(parts) + 1
    for one, other in itertools.combinations(latents, 2):
        assert float((latents[one] - latents[other]).abs().max()) > 0.01, (one, other)  # rounding: 1e-5


def test_a_part_that_is_none_or_comes_twice_is_a_usage_error() -> None:
    assert split_parts("") == [] and split_parts("attnx+writenet") == ["attnx", "writenet"]
    with pytest.raises(UsageError, match=r"--without attnx\+glyphs: received 'glyphs', expected one of attnx, "):
        split_parts("attnx+glyphs")
    with pytest.raises(UsageError, match="received a part twice"):
        split_parts("attnx+attnx")


def test_undrawn_layouts_follow_the_benchmarks_cut_and_names(tmp_path: Path) -> None:
    polygon = [[0, 0], [50, 0], [50, 20], [0, 20]]
    lines = [{"polygon": polygon, "text": f"line {i} {'x' * 30}", "language": "Latin"} for i in range(25)]
    lines[0]["valid"], lines[3]["glyph_map"] = False, False
    path = write_annotations(tmp_path / "a.json", annotation(0, img_name="000123.new.jpg", annotations=lines))
    config = load(None, "inputs.use_images=false")  # type: ignore[arg-type]
    (layout,) = read_undrawn([open_inputs([path], [], config.inputs, {})[0]])
    assert layout.name == image_stem("some/000123.new.jpg") == "000123"
    assert len(layout.lines) == 20
    assert [place for place, line in enumerate(layout.lines) if not line.in_glyph_map] == [2]
    assert layout.lines[0].text == "line 1 xxxxxxxxxxxxx"
    assert layout.size == (512, 512)
