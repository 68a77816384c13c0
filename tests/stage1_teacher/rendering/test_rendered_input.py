from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import load_config
from common.errors import DataError
from stage1_teacher.inputs.captions import text_caption
from stage1_teacher.inputs.files import Inputs
from stage1_teacher.inputs.input import FontLacksCharacters, Input, InputFailure, Line
from stage1_teacher.inputs.prompts import Prompts
from stage1_teacher.rendering.ahead import render_ahead
from stage1_teacher.rendering.rendered_input import RenderedInput, render_input
from stage1_teacher.rendering.settings import RenderSettings
from tests.stage1_teacher.small_teacher import DATA, FONT, ROOT, write_prompts

BOLD = ROOT / "models" / "fonts" / "DejaVuSans-Bold.ttf"
SETTINGS = RenderSettings(
    seed=0,
    size=128,
    font=FONT,
    fonts={"bold": BOLD},
    random_fonts=False,
    font_hint_prob=1.0,
    edit_fraction=0.0,
    max_lines=5,
    max_chars=20,
    prompt_suffix="",
    needs_image=False,
)


def corners(x0: float, y0: float, x1: float, y1: float) -> tuple[tuple[float, float], ...]:
    return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def line(text: str = "OPEN", **changes: Any) -> Line:
    return Line(**({"text": text, "polygon": corners(10, 10, 118, 40)} | changes))


def content(*lines: Line, **changes: Any) -> Input:
    base: dict[str, Any] = {"where": "here", "input_id": "id", "caption": "a sign", "frame": (128, 128)}
    return Input(**(base | {"lines": lines} | changes))


def with_image(*lines: Line, **changes: Any) -> Input:
    return content(*lines, **({"image": DATA / "imgs" / "a.png", "frame": None} | changes))


def draw(value: Input, **changes: Any) -> RenderedInput:
    return render_input(value, replace(SETTINGS, **changes))


def same(first: RenderedInput, second: RenderedInput) -> bool:
    for name in RenderedInput.__dataclass_fields__:
        ours, theirs = getattr(first, name), getattr(second, name)
        if not (torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs):
            return False
    return True


def test_shapes_and_types_are_as_documented() -> None:
    lines = line(polygon=corners(10, 10, 300, 90)), line("24H", polygon=corners(100, 300, 400, 420))
    rendered = draw(with_image(*lines))
    shapes = {
        "colors": ((2, 3), torch.float32),
        "glyphs": ((1, 128, 128), torch.uint8),
        "positions": ((2, 128, 128), torch.uint8),
        "glyph_lines": ((2, 1, 80, 512), torch.float32),
        "font_hint": ((1, 128, 128), torch.float32),
        "masked_image": ((3, 128, 128), torch.float32),
        "image": ((3, 128, 128), torch.float32),
    }
    for name, expected in shapes.items():
        tensor = getattr(rendered, name)
        assert (tuple(tensor.shape), tensor.dtype) == expected
    assert rendered.polygons[0][2] == (75, 22.5)  # 512 to 128


def test_nothing_depends_on_when_or_beside_what_an_input_is_drawn() -> None:
    values = [with_image(line(), input_id=str(number)) for number in range(4)]
    options = {"edit_fraction": 0.5, "font_hint_prob": 0.5, "random_fonts": True}
    forwards = [draw(value, **options) for value in values]
    backwards = [draw(value, **options) for value in reversed(values)][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_an_input_without_text_gets_upstreams_blank_line_at_any_size() -> None:
    for size in (512, 128):
        rendered = draw(content(frame=(300, 300)), size=size)
        assert rendered.texts == (" ",)
        assert rendered.polygons[0] == corners(*[value * size / 512 for value in (10, 10, 100, 100)])
        assert not rendered.glyphs.any() and rendered.positions.any()
        assert rendered.colors.tolist() == [[500, 500, 500]]


def test_of_many_lines_some_are_chosen_by_seed_and_input() -> None:
    lines = [
        line(f"line {number}", polygon=corners(5, 5 + 12 * number, 120, 15 + 12 * number)) for number in range(9)
    ]
    chosen = {draw(content(*lines, input_id=str(number))).texts for number in range(12)}
    assert len(chosen) > 6
    for texts in chosen:
        assert len(texts) == 5 and sorted(texts) == list(texts)  # in the order of the annotation
    assert draw(content(*lines), max_lines=9).texts == tuple(f"line {number}" for number in range(9))


def test_a_long_line_is_cut() -> None:
    assert draw(content(line("x" * 50))).texts == ("x" * 20,)
    assert draw(content(line("x" * 50)), max_chars=3).texts == ("xxx",)


def test_edit_mode_takes_its_share_of_inputs_that_have_an_image() -> None:
    values = [with_image(line(), input_id=str(number)) for number in range(60)]
    modes = Counter(draw(value, edit_fraction=0.5, size=64).mode for value in values)
    assert 18 <= modes["edit"] <= 42
    assert {draw(value, edit_fraction=1.0, size=64).mode for value in values[:5]} == {"edit"}
    assert draw(content(line()), edit_fraction=1.0).mode == "generate"
    assert draw(with_image(line(), mode="generate"), edit_fraction=1.0).mode == "generate"
    assert draw(with_image(line(), mode="edit")).mode == "edit"


def test_font_hints_are_given_for_their_share_of_lines() -> None:
    values = [with_image(line(polygon=corners(76, 75, 436, 165)), input_id=str(number)) for number in range(60)]
    given = sum(bool(draw(value, font_hint_prob=0.5).font_hint.any()) for value in values)
    assert 18 <= given <= 42
    assert not draw(values[0], font_hint_prob=0.0).font_hint.any()
    assert draw(values[0]).font_hint.any()
    assert not draw(content(line())).font_hint.any()  # nothing is known about how it looks


def test_a_font_that_is_asked_for_draws_the_line_and_shows_its_look() -> None:
    plain, bold = draw(content(line())), draw(content(line(font=BOLD)))
    assert bold.glyph_lines.sum() > 1.05 * plain.glyph_lines.sum()
    assert torch.equal(bold.font_hint, bold.glyphs.float())


def test_a_line_that_is_not_to_be_in_the_glyph_map_is_everything_else_as_before() -> None:
    hidden, shown = line(in_glyph_map=False, font=BOLD), line("SHUT", polygon=corners(10, 60, 118, 90))
    both, one = draw(content(hidden, shown)), draw(content(shown))
    whole = draw(content(replace(hidden, in_glyph_map=True), shown))
    assert torch.equal(both.glyphs, one.glyphs) and bool(both.glyphs.any())
    assert both.in_glyph_map == (False, True) and whole.in_glyph_map == (True, True)
    assert not same(both, whole)
    assert same(replace(both, glyphs=whole.glyphs, in_glyph_map=whole.in_glyph_map), whole)


def test_random_fonts_are_chosen_among_those_that_have_the_characters() -> None:
    def used(text: str, **changes: Any) -> int:
        rendered = [draw(content(line(text), input_id=str(n)), random_fonts=True, **changes) for n in range(12)]
        return len({tuple(item.glyph_lines.flatten().tolist()) for item in rendered})

    assert used("OPEN") == 2
    plain_only = "\U0001d5a0"  # DejaVu Sans has it, its bold face does not
    assert used(plain_only) == 1
    assert draw(content(line(plain_only)), random_fonts=True).glyphs.any()
    once, twice = (
        [draw(content(line(), input_id=str(n)), random_fonts=True, fonts=fonts).glyphs for n in range(12)]
        for fonts in ({"bold": BOLD}, {"bold": BOLD, "the default again": FONT})
    )
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_an_inputs_own_seed_replaces_the_runs() -> None:
    assert draw(content(line(), seed=9)).seed == 9
    phrases = {draw(content(line(), seed=seed), size=64).text_caption for seed in range(20)}
    assert len(phrases) > 3
    assert draw(content(line(), seed=9)).text_caption == text_caption(1, seed=9, input_id="id")
    assert draw(content(line()), seed=9).text_caption == text_caption(1, seed=9, input_id="id")


def test_overlapping_lines_are_counted_in_positions_and_united_in_glyphs() -> None:
    rendered = draw(content(line(), line("24H", polygon=corners(10, 20, 118, 60))))
    assert rendered.positions.sum(0).max() == 2
    assert rendered.glyphs.max() == 1


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        (corners(200, 200, 300, 300), "outside the image"),
        (corners(-90, -90, -10, -10), "outside the image"),
        (((10, 10), (50, 50), (90, 90)), "less than a pixel wide"),
        (corners(-1e6, -1e6, 1e6, 1e6), "far out of the image"),
        (corners(10, 10, 100, 10.5), "less than a pixel wide"),
    ],
)
def test_a_polygon_without_place_or_area_is_a_failure(polygon: Any, message: str) -> None:
    with pytest.raises(InputFailure, match=message) as caught:
        draw(content(line(), line("bad", polygon=polygon)))
    assert caught.value.reason == "bad polygon"
    assert str(caught.value).startswith("here: line 'bad': ")


@pytest.mark.parametrize(
    "polygon",
    [
        corners(-30, 10, 500, 40),
        ((10, 10), (118, 40), (118, 10), (10, 40)),
        ((10, 10), (60, 10), (118, 12), (118, 40), (60, 44), (10, 40)),
        ((64, 5), (120, 120), (8, 120)),
        corners(-1000, -1000, 1000, 1000),
    ],
    ids=["beyond the edge", "bow tie", "six corners", "triangle", "enormous"],
)
def test_odd_polygons_that_touch_the_image_are_drawn(polygon: Any) -> None:
    rendered = draw(with_image(line(polygon=polygon), frame=(128, 128)))
    assert rendered.positions.any()
    assert np.isfinite(rendered.font_hint.numpy()).all()


def test_noised_records_need_an_image(tmp_path: Path) -> None:
    with pytest.raises(InputFailure, match="needs an image"):
        draw(content(line()), needs_image=True)
    broken = tmp_path / "broken.png"
    broken.write_bytes((DATA / "imgs" / "a.png").read_bytes()[:500])
    with pytest.raises(InputFailure, match="cannot be decoded"):
        draw(with_image(line(), image=broken))


def test_a_line_that_its_font_lacks_is_rendered_in_the_first_fallback_that_has_all_of_it() -> None:
    roboto, serif = (FONT.with_name(name) for name in ("Roboto-Bold.ttf", "SourceSerifPro-Bold.otf"))
    hebrew = line("שלום", font=roboto)
    expected = r"font Roboto-Bold.ttf lacks ש \(U\+05E9\) ל .*fallback_fonts"
    with pytest.raises(FontLacksCharacters, match=expected) as caught:
        draw(content(hebrew), fallback_fonts=(serif,))
    assert caught.value.characters == "שלום"
    fallen = draw(content(hebrew), fallback_fonts=(serif, BOLD, FONT))
    asked = draw(content(line("שלום", font=BOLD)))
    assert same(fallen, asked)
    # One font for the whole line, and none in the place of one that has the characters.
    with pytest.raises(FontLacksCharacters):
        draw(content(line("CAFÉ 咖啡")), fallback_fonts=(BOLD,))
    assert same(draw(content(line("CAFÉ")), fallback_fonts=(BOLD,)), draw(content(line("CAFÉ"))))


def test_what_is_not_meant_to_be_seen_needs_no_glyph() -> None:
    for text in ("A\u3000B", "A\u200dB", "A\u00a0B", "❤\ufe0f", "Cafe\u0301", "\u01ed"):
        assert draw(content(line(text))).glyphs.any()
    for text in ("咖", "नमस्ते", "A\U0010fffd"):
        with pytest.raises(FontLacksCharacters):
            draw(content(line(text)))
    assert draw(content(line("OPEN " * 4 + "咖啡"))).texts == ("OPEN " * 4,)  # only what is rendered counts


def test_settings_check_their_fonts(tmp_path: Path) -> None:
    shutil.copy(FONT, tmp_path / "copy.ttf")
    (tmp_path / "config.toml").write_text('[inputs]\nfont = "copy.ttf"\n[inputs.fonts]\nbold = "bold.ttf"\n')
    with pytest.raises(DataError, match=r"inputs\.fonts\.bold: no file or folder 'bold\.ttf'"):
        RenderSettings.from_config(load_config(tmp_path / "config.toml"))
    shutil.copy(BOLD, tmp_path / "bold.ttf")
    settings = RenderSettings.from_config(load_config(tmp_path / "config.toml"))
    assert settings.fonts == {"bold": tmp_path / "bold.ttf"}


def test_inputs_are_drawn_ahead_in_order_and_failures_keep_their_place(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "prompts.jsonl", 12)
    text = path.read_text().replace('"P5"', '""')
    path.write_text(text)
    inputs = Inputs([Prompts(path, size=64, fonts={})])
    indices = [3, 5, 0, 11, 7]
    for workers, ahead in ((1, 1), (3, 2), (4, 50)):
        with render_ahead(inputs, indices, SETTINGS, workers=workers, ahead=ahead) as rendered:
            outcomes = list(rendered)
        assert [getattr(item, "texts", item.__class__) for item in outcomes] == [
            ("P3",),
            InputFailure,
            ("P0",),
            ("P11",),
            ("P7",),
        ]


def test_a_bug_in_drawing_is_not_taken_for_a_failed_input() -> None:
    class Broken(Inputs):
        def __getitem__(self, index: int) -> Input:
            raise TypeError("a bug")

    with (
        render_ahead(Broken([]), [0], SETTINGS, workers=1, ahead=1) as rendered,
        pytest.raises(TypeError, match="a bug"),
    ):
        next(rendered)


def test_an_image_that_is_not_square_has_its_lines_where_they_were_asked_for() -> None:
    path = DATA / "imgs" / "a.png"
    for value in (content(line(), frame=None), with_image(line(), frame=None, mode="edit")):
        wide = draw(value, size=64, width=192)
        assert wide.size == (64, 192) == tuple(wide.glyphs.shape[1:]) == tuple(wide.masked_image.shape[1:])
        rows, columns = np.nonzero(wide.positions[0].numpy())
        own = (192, 64) if value.image is None else Image.open(path).size
        scaled = [(x * 192 / own[0], y * 64 / own[1]) for x, y in corners(10, 10, 118, 40)]
        (left, top), (right, bottom) = scaled[0], scaled[2]
        assert abs(columns.min() - left) <= 1 and abs(columns.max() - min(right, 191)) <= 1
        assert abs(rows.min() - top) <= 1 and abs(rows.max() - bottom) <= 1
