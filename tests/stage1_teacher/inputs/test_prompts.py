from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError, UsageError
from stage1_teacher.inputs.input import UNKNOWN_COLOR, Input, InputFailure
from stage1_teacher.inputs.prompt_text import prompt_from_text
from stage1_teacher.inputs.prompts import Prompts

ROOT = Path(__file__).parents[3]
FONT = ROOT / "models" / "fonts" / "DejaVuSans.ttf"
IMAGES = ROOT / "tests" / "golden" / "data" / "imgs"


def prompt(**changes: Any) -> dict[str, Any]:
    return {"caption": "a sign", "lines": [line()]} | changes


def line(**changes: Any) -> dict[str, Any]:
    value = {"text": "OPEN", "box": [10, 20, 110, 60]} | changes
    return {name: item for name, item in value.items() if item is not ...}


def write(folder: Path, *prompts: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in prompts))
    return path


def read(folder: Path, *values: Any, **options: Any) -> Prompts:
    return Prompts(write(folder, *values), **({"size": 128, "fonts": {"plain": FONT}} | options))


def reason_of(folder: Path, value: Any) -> str:
    prompts = read(folder, value)
    with pytest.raises(InputFailure) as caught:
        prompts[0]
    assert str(caught.value).startswith("prompts.jsonl:1: ")
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_a_prompt_needs_no_image(tmp_path: Path) -> None:
    lines = [line(color="#dc1e28", font="plain"), line(polygon=[[1, 2], [9, 2], [5, 8]], box=...)]
    content = read(tmp_path, prompt(lines=lines))[0]
    assert content.caption == "a sign"
    assert content.image is None
    assert content.frame == (128, 128)
    assert content.lines[0].polygon == ((10, 20), (110, 20), (110, 60), (10, 60))
    assert content.lines[0].color == (220, 30, 40)
    assert content.lines[0].font == FONT
    assert content.lines[1].polygon == ((1, 2), (9, 2), (5, 8))
    assert content.lines[1].color == UNKNOWN_COLOR


def test_optional_fields_are_read(tmp_path: Path) -> None:
    shutil.copy(IMAGES / "a.png", tmp_path / "a.png")
    shutil.copy(FONT, tmp_path / "mine.ttf")
    lines = [line(font="mine.ttf", color=[1, 2, 3], language="English", glyph_map=False)]
    content = read(tmp_path, prompt(size=512, seed=7, image="a.png", mode="edit", lines=lines))[0]
    assert (content.frame, content.seed, content.mode) == ((512, 512), 7, "edit")
    assert content.image == (tmp_path / "a.png").resolve()
    assert content.lines[0].font == tmp_path.resolve() / "mine.ttf"
    assert content.lines[0].language == "English"
    assert not content.lines[0].in_glyph_map and read(tmp_path, prompt())[0].lines[0].in_glyph_map
    assert read(tmp_path, prompt(image="a.png"), use_images=False)[0].image is None
    assert read(tmp_path, {"caption": "no text"})[0].lines == ()


def test_blank_lines_do_not_count_and_places_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(prompt()) + "\n\n \n" + json.dumps(prompt(caption="é")))
    prompts = Prompts(path, size=64, fonts={})
    assert len(prompts) == 2
    assert prompts.where(1) == "prompts.jsonl:4"
    assert prompts[1].caption == "é"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"caption": "x"', r"prompts\.jsonl:2: not JSON"),
        ("[1, 2]", r"prompts\.jsonl:2: \[1, 2\] is no object"),
        ('{"captions": "x"}', r"prompts\.jsonl:2: unknown field 'captions'; did you mean caption\?"),
        ('{"lines": [{"txt": "x"}]}', r"prompts\.jsonl:2: lines\[0\]: unknown field 'txt'; did you mean text\?"),
        ("\udcff", r"prompts\.jsonl:2: not JSON"),
    ],
)
def test_a_line_of_another_structure_stops_everything_at_once(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{json.dumps(prompt())}\n{text}\n", errors="surrogateescape")
    with pytest.raises(DataError, match=message) as caught:
        Prompts(path, size=64, fonts={})
    assert not isinstance(caught.value, InputFailure)
    with pytest.raises(DataError, match="No such file"):
        Prompts(tmp_path / "none.jsonl", size=64, fonts={})
    path.write_text('{"caption": "x", "comment": "y"}')
    assert Prompts(path, size=64, fonts={}, ignored_fields=["comment"])[0].caption == "x"


def test_four_corners_in_any_order_are_the_same_quadrilateral(tmp_path: Path) -> None:
    corners = [[5, 18], [91, 20], [88, 48], [2, 44]]
    around = [corners[i:] + corners[:i] for i in range(4)]
    around += [order[::-1] for order in around]
    for order in itertools.permutations(corners):
        polygon = read(tmp_path, prompt(lines=[line(polygon=list(order), box=...)]))[0].lines[0].polygon
        assert [list(corner) for corner in polygon] in around
        assert list(map(list, polygon)) == list(order) or list(order) not in around  # one that was right stays
    dented = [[0, 0], [90, 0], [40, 20], [0, 90]]  # not convex, and no sides cross
    assert read(tmp_path, prompt(lines=[line(polygon=dented, box=...)]))[0].lines[0].polygon == tuple(
        map(tuple, dented)
    )


def test_texts_are_composed_and_what_shows_nothing_is_empty(tmp_path: Path) -> None:
    texts = "Cafe\u0301", "CO²", "ﬁn", "Ａ", "क\u094dष"
    lines = read(tmp_path, prompt(lines=[line(text=text) for text in texts]))[0].lines
    assert [text.text for text in lines] == ["Café", "CO²", "ﬁn", "Ａ", "क\u094dष"]
    for nothing in ("\u200b", "\ufeff \u2060", "\u3164", "\u2800\u00ad", "\ufe0f", "\u3000", "\U000e0100"):
        assert reason_of(tmp_path, prompt(lines=[line(text=nothing)])) == "empty text"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (prompt(caption=None), "bad caption"),
        ({"lines": []}, "bad caption"),
        (prompt(lines={}), "bad prompt"),
        (prompt(lines=["x"]), "bad prompt"),
        (prompt(lines=[line(text="")]), "empty text"),
        (prompt(lines=[line(box=[10, 20, 10, 60])]), "bad polygon"),
        (prompt(lines=[line(box=[10, 20, 110])]), "bad polygon"),
        (prompt(lines=[line(box=...)]), "bad polygon"),
        (prompt(lines=[line(polygon=[[1, 2], [3, 4], [5, 9]])]), "bad polygon"),
        (prompt(lines=[line(polygon=[[1, 2], [3, 4]], box=...)]), "bad polygon"),
        (prompt(lines=[line(color="#12345g")]), "bad color"),
        (prompt(lines=[line(color="red")]), "bad color"),
        (prompt(lines=[line(font="plian")]), "bad font"),
        (prompt(lines=[line(font="prompts.jsonl")]), "bad font"),
        (prompt(lines=[line(language=1)]), "bad prompt"),
        (prompt(lines=[line(glyph_map=0)]), "bad glyph_map"),
        (prompt(size=0), "bad prompt"),
        (prompt(seed="7"), "bad prompt"),
        (prompt(mode="edit"), "bad prompt"),
        (prompt(mode="paint"), "bad prompt"),
        (prompt(image="../a.png"), "image outside its folder"),
        (prompt(image="none.png"), "image missing"),
    ],
)
def test_a_wrong_value_is_a_failure_of_its_prompt(tmp_path: Path, value: Any, reason: str) -> None:
    assert reason_of(tmp_path, value) == reason


def test_a_font_counts_by_its_bytes_not_by_its_name(tmp_path: Path) -> None:
    shutil.copy(FONT, tmp_path / "other-name.ttf")
    by_name = read(tmp_path, prompt(lines=[line(font="plain")])).input_id(0)
    without = read(tmp_path, prompt()).input_id(0)
    by_path = read(tmp_path, prompt(lines=[line(font="other-name.ttf")]))
    assert by_name == by_path.input_id(0) == by_path[0].input_id
    assert without != by_name


def test_a_file_that_changes_while_in_use_is_noticed(tmp_path: Path) -> None:
    prompts = read(tmp_path, prompt(caption="first"), prompt(caption="second"))
    write(tmp_path, prompt(caption="third"), prompt(caption="second"))
    with pytest.raises(DataError, match="changed while it was in use"):
        prompts[0]


def test_a_sentence_with_quoted_texts_is_a_prompt() -> None:
    content = prompt_from_text(
        'a sign that says "OPEN" and “24H”',
        ["10,20,110,60", "10,70,110,100.5"],
        size=128,
        fonts={"plain": FONT},
        colors=["#ff0000"],
        font="plain",
        seed=3,
    )
    assert content.caption == 'a sign that says "OPEN" and “24H”'
    assert [item.text for item in content.lines] == ["OPEN", "24H"]
    assert content.lines[1].polygon[2] == (110, 100.5)
    assert {item.color for item in content.lines} == {(255, 0, 0)}
    assert content.seed == 3
    assert prompt_from_text("no text at all", [], size=128).lines == ()


def test_a_sentence_with_an_image_edits_it() -> None:
    content = prompt_from_text('a "new" text', ["1,1,50,50"], size=512, image=IMAGES / "a.png", font=str(FONT))
    assert content.mode == "edit"
    assert content.image == (IMAGES / "a.png").resolve()
    assert content.lines[0].font == FONT


def test_a_sentence_and_a_prompts_file_give_the_same_content(tmp_path: Path) -> None:
    typed: Input = prompt_from_text('says "OPEN"', ["10,20,110,60"], size=128)
    stored = read(tmp_path, {"caption": 'says "OPEN"', "lines": [{"text": "OPEN", "box": [10, 20, 110, 60]}]})[0]
    assert (typed.caption, typed.lines, typed.frame) == (stored.caption, stored.lines, stored.frame)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (('says "A" and "B"', ["1,1,9,9"]), "2 texts from the prompt, between .* \\('A', 'B'\\) and 1 boxes"),
        (('says "A"', ["1,1,9"]), "expected \\[x0, y0, x1, y1\\]"),
        (('says "A"', ["1,1,9,x"]), "expected x0,y0,x1,y1"),
        (('says ""', ["1,1,9,9"]), "text is empty"),
    ],
)
def test_a_sentence_that_does_not_match_its_boxes_is_a_usage_error(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prompt_from_text(*arguments, size=128)
    with pytest.raises(UsageError, match="3 colours for 1 texts"):
        prompt_from_text('"A"', ["1,1,9,9"], size=128, colors=["#000000"] * 3)


def test_texts_beside_their_boxes_leave_the_sentences_marks_alone() -> None:
    sentence = 'a 5" pipe with "OPEN"'
    content = prompt_from_text(sentence, ["1,1,50,50"], texts=["OPEN"], size=128)
    assert [item.text for item in content.lines] == ["OPEN"] and content.caption == sentence
    content = prompt_from_text("a sign", ["1,1,50,50"], texts=['say "hi"'], size=128)
    assert [item.text for item in content.lines] == ['say "hi"']
    with pytest.raises(UsageError, match=r"1 texts from --text \('A'\) and 2 boxes"):
        prompt_from_text("a sign", ["1,1,9,9"] * 2, texts=["A"], size=128)


@pytest.mark.parametrize(
    "sentence",
    [
        'a 5" pipe with "OPEN"',
        "a 5\" pipe with 'OPEN' and a 6\" one",
        "a \u00abB\u00bb and \u201cOPEN",
        'says " OPEN"',
    ],
)
def test_marks_that_quote_nothing_are_not_taken_for_quotation_marks(sentence: str) -> None:
    with pytest.raises(UsageError, match="give the texts themselves as one --text beside each --box"):
        prompt_from_text(sentence, ["1,1,50,50"], size=128)


def test_a_mark_in_a_sentence_without_texts_is_just_a_mark() -> None:
    assert prompt_from_text('a 5" pipe', [], size=128).lines == ()
    with pytest.raises(UsageError, match="no text to use it for"):
        prompt_from_text("a pipe", [], size=128, colors=["#000000"])


def test_it_is_said_which_texts_were_found(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "stage1_teacher"):
        prompt_from_text("says \u201cOPEN\u201d", ["1,1,50,50"], size=128)
    assert caplog.messages == [
        "texts, from the prompt, between \"...\", \u201c...\u201d or \u00ab...\u00bb: 'OPEN'"
    ]
