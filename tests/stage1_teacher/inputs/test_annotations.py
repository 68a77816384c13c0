from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError
from stage1_teacher.inputs.annotations import Annotations, caption_as_annotated
from stage1_teacher.inputs.input import UNKNOWN_COLOR, Input, InputFailure

GOLDEN = Path(__file__).parents[2] / "golden" / "data"
FONT = Path(__file__).parents[3] / "models" / "fonts" / "DejaVuSans.ttf"
SQUARE = [[10, 10], [100, 10], [100, 60], [10, 60]]


def line(**changes: Any) -> dict[str, Any]:
    return {"polygon": SQUARE, "text": "OPEN", "language": "Latin"} | changes


def entry(**changes: Any) -> dict[str, Any]:
    return {"img_name": "a.png", "caption": "a sign", "annotations": [line()]} | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "imgs", tmp_path / "imgs")
    return tmp_path


def write(folder: Path, *entries: Any, root: Any = "imgs", **fields: Any) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps({"data_root": root, "data_list": list(entries), **fields}))
    return path


def read_one(folder: Path, value: Any, **options: Any) -> Input:
    return Annotations(write(folder, value), **options)[0]


def reason_of(folder: Path, value: Any) -> tuple[str, str]:
    with pytest.raises(InputFailure) as caught:
        read_one(folder, value)
    assert "\n" not in str(caught.value)
    return caught.value.reason, str(caught.value)


def test_what_may_be_read_otherwise_than_meant_is_counted_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    odd = [line(valid=0), line(valid="false"), line(valid=False), line(valid=True), line(valid=None), line()]
    entries = entry(annotations=odd), entry(wm_score=0.9, annotations=[line(valid=1)]), entry(wm_score=0.1)
    annotations = Annotations(write(folder, *entries), watermark_threshold=0.5)
    assert len(annotations[0].lines) == 5  # as ever: only false leaves a line out
    left_out, valid = caplog.messages
    assert "entries that are left out: 1, with a wm_score above inputs.watermark_threshold = 0.5" in left_out
    assert "lines whose `valid` is neither true nor false: 2 (" in valid
    assert "data.json: data_list[0].annotations[0] has 0" in valid
    caplog.clear()
    large = write(folder, entry(annotations=[line(polygon=[[1, 1], [900, 1], [900, 90]])]))
    assert Annotations(large, use_images=False)[0].frame == (512, 512)
    assert "does not fit the image size that is assumed without images: 1 (" in caplog.messages[0]
    caplog.clear()
    assert Annotations(large, use_images=False, frame=1024)[0].frame == (1024, 1024)
    assert not caplog.messages


def test_a_line_that_is_not_rendered_may_have_any_polygon(folder: Path) -> None:
    for polygon in ([[1, 2]], "nowhere", None, [[0, 0], [1, None], [5, 5]], ...):
        hidden = {name: value for name, value in line(polygon=polygon, valid=False).items() if value is not ...}
        (kept,) = read_one(folder, entry(annotations=[hidden, line()])).lines
        assert kept.text == "OPEN"


def test_every_field_of_both_versions_is_read(folder: Path) -> None:
    content = read_one(
        folder,
        entry(
            wm_score=0.9,
            annotations=[
                line(color=[220, 30, 40], valid=True, pos=3, rec_score=0.99),
                line(text="###", valid=False),
                line(polygon=[]),
                line(text="說話", language="Chinese"),
            ],
        ),
    )
    assert content.caption == "a sign with watermarks "
    assert [item.text for item in content.lines] == ["OPEN", "說話"]
    assert content.lines[0].color == (220, 30, 40)
    assert content.lines[1].color == UNKNOWN_COLOR
    assert content.image == (folder / "imgs" / "a.png").resolve()
    assert read_one(folder, entry(wm_score=0.5)).caption == "a sign no watermarks "
    assert read_one(folder, {"img_name": "a.png"}) == Input(
        where="data.json: data_list[0]",
        input_id=Annotations(folder / "data.json").input_id(0),
        caption="",
        lines=(),
        image=(folder / "imgs" / "a.png").resolve(),
        name="a.png",
    )


def test_a_line_may_name_its_font_which_counts_by_its_bytes(folder: Path) -> None:
    shutil.copy(FONT, folder / "mine.ttf")
    by_name = read_one(folder, entry(annotations=[line(font="plain"), line()]), fonts={"plain": FONT})
    assert [item.font for item in by_name.lines] == [FONT, None]
    by_path = read_one(folder, entry(annotations=[line(font="mine.ttf"), line()]))
    assert by_path.lines[0].font == folder / "mine.ttf"
    assert by_path.input_id == by_name.input_id
    assert by_path.input_id != read_one(folder, entry(annotations=[line(), line()])).input_id


def test_a_line_may_be_left_out_of_the_glyph_map_which_its_id_tells(folder: Path) -> None:
    value = entry(annotations=[line(glyph_map=False), line(glyph_map=True), line(glyph_map=None), line()])
    content = read_one(folder, value)
    assert [item.in_glyph_map for item in content.lines] == [False, True, True, True]
    assert content.input_id != read_one(folder, entry(annotations=[line(), line(), line(), line()])).input_id
    reason, message = reason_of(folder, entry(annotations=[line(glyph_map="no")]))
    assert reason == "bad glyph_map" and "annotations[0]: glyph_map is 'no', expected true or false" in message


@pytest.mark.parametrize("font", ["plian", "data.json", "", 3, "x" * 5000, "a\0b"])
def test_a_font_that_is_none_is_a_failure_of_its_entry(folder: Path, font: Any) -> None:
    reason, message = reason_of(folder, entry(annotations=[line(font=font)]))
    assert reason == "bad font" and "annotations[0]" in message


def test_data_root_may_be_absolute_or_relative_to_the_file(folder: Path) -> None:
    for root in (str(folder / "imgs"), "imgs", "./imgs/../imgs"):
        assert Annotations(write(folder, entry(), root=root))[0].image == (folder / "imgs" / "a.png").resolve()
    with pytest.raises(DataError, match=r"data_root 'nowhere' is no folder; looked at /"):
        Annotations(write(folder, entry(), root="nowhere"))
    with pytest.raises(DataError, match="data_root is 3, expected"):
        Annotations(write(folder, entry(), root=3))


def test_an_id_depends_on_what_is_said_and_not_on_where_it_lies(folder: Path, tmp_path: Path) -> None:
    def id_of(value: Any, **options: Any) -> str:
        return Annotations(write(folder, value), **options).input_id(0)

    original = id_of(entry())
    assert len(original) == 32
    assert id_of(entry(annotations=[line(rec_score=0.5, pos=1)])) == original
    shutil.copytree(folder, tmp_path / "moved")
    moved = Annotations(write(tmp_path / "moved", entry(img_name="b.png"), entry()))
    assert moved.input_id(1) == original == moved[1].input_id
    changed = [
        entry(caption="a sign!"),
        entry(img_name="b.png"),
        entry(wm_score=0.1),
        entry(annotations=[line(text="0PEN")]),
        entry(annotations=[line(polygon=[*SQUARE[:3], [10, 61]])]),
        entry(annotations=[line(color=[1, 2, 3])]),
        entry(annotations=[line(), line()]),
        "no object",
    ]
    ids = [id_of(value) for value in changed]
    assert len({original, *ids, id_of(entry(), use_images=False)}) == len(ids) + 2


def test_the_watermark_phrase_is_taken_off_again_and_nothing_else(folder: Path) -> None:
    for more in ({}, {"wm_score": 0.2}, {"wm_score": 0.9}):
        for caption in ("a sign", "a page with watermarks", ""):
            content = read_one(folder, entry(caption=caption, **more))
            assert caption_as_annotated(content.caption) == caption


def test_watermarked_entries_are_left_out_and_do_not_count(folder: Path) -> None:
    path = write(folder, entry(wm_score=0.9), entry(caption="second", wm_score=0.2), entry(caption="third"))
    kept = Annotations(path, watermark_threshold=0.5)
    assert [kept[i].caption for i in range(len(kept))] == ["second no watermarks ", "third"]
    assert kept.where(0) == "data.json: data_list[1]"
    assert len(Annotations(path)) == 3


def test_an_unknown_field_is_one_line_that_names_it_and_the_nearest(folder: Path) -> None:
    cases = {
        r"data_list\[1\]: unknown field 'captoin'; did you mean caption\?": [entry(), entry(captoin="x")],
        r"annotations\[0\]: unknown field 'colour'; did you mean color\?": [entry(annotations=[line(colour=1)])],
        r"data_list\[0\]: unknown field 'zzz'; known: annotations, caption, img_name, wm_score": [entry(zzz=1)],
    }
    for message, entries in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            Annotations(write(folder, *entries))
        assert not isinstance(caught.value, InputFailure)
        assert "inputs.ignore_fields" in str(caught.value)
    with pytest.raises(DataError, match=r"unknown field 'version'"):
        Annotations(write(folder, entry(), version=2))
    ignoring = Annotations(write(folder, entry(zzz=1), version=2), ignored_fields=["zzz", "version"])
    assert ignoring[0].lines[0].text == "OPEN"
    assert ignoring.input_id(0) == Annotations(write(folder, entry())).input_id(0)


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"polygon": [[1, 1], [9, 9]]}, "bad polygon", "2 different points"),
        ({"polygon": [[1, 1], [9, 9], [1, 1], [9, 9]]}, "bad polygon", "2 different points"),
        ({"polygon": [[1, 1], [9, float("nan")], [4, 4]]}, "bad polygon", "finite numbers"),
        ({"polygon": [[1, 1], [9, 1e300], [4, 4]]}, "bad polygon", "far outside"),
        ({"polygon": [[1, 1], [9, "9"], [4, 4]]}, "bad polygon", "finite numbers"),
        ({"polygon": [1, 2, 3, 4]}, "bad polygon", "finite numbers"),
        ({"polygon": None}, "bad polygon", "finite numbers"),
        ({"text": ""}, "empty text", "text is empty"),
        ({"text": " \t"}, "empty text", "text is empty"),
        ({"text": "two\nlines"}, "bad text", "control character"),
        ({"text": "\ud800"}, "bad text", "control character"),
        ({"text": 24}, "bad text", "expected a string"),
        ({"color": [1, 2]}, "bad color", "expected"),
        ({"color": [1, 2, 300]}, "bad color", "expected"),
        ({"language": 5}, "bad entry", "language"),
    ],
)
def test_a_line_that_cannot_be_drawn_is_a_failure_of_its_input(
    folder: Path, changes: dict[str, Any], reason: str, message: str
) -> None:
    assert reason_of(folder, entry(annotations=[line(), line(**changes)]))[0] == reason
    assert message in reason_of(folder, entry(annotations=[line(), line(**changes)]))[1]
    assert "data_list[0].annotations[1]" in reason_of(folder, entry(annotations=[line(), line(**changes)]))[1]


@pytest.mark.parametrize(
    "value",
    [
        "text",
        None,
        [],
        entry(caption=3),
        entry(caption="\udcff"),
        entry(annotations={"polygon": SQUARE}),
        entry(annotations=["text"]),
        entry(annotations=[{"text": "no polygon"}]),
        entry(wm_score="high"),
        entry(img_name=None),
        entry(img_name=""),
        entry(img_name="a\0.png"),
    ],
)
def test_an_entry_of_another_shape_is_a_failure_of_that_input_alone(folder: Path, value: Any) -> None:
    annotations = Annotations(write(folder, value, entry()))
    with pytest.raises(InputFailure):
        annotations[0]
    assert annotations[1].caption == "a sign"


def test_an_image_outside_data_root_is_refused(folder: Path) -> None:
    outside = folder / "secret.png"
    shutil.copy(folder / "imgs" / "a.png", outside)
    (folder / "imgs" / "link.png").symlink_to(outside)
    (folder / "imgs" / "inner.png").symlink_to(folder / "imgs" / "a.png")
    (folder / "imgs" / "up").symlink_to(folder)
    for name in ("../secret.png", str(outside), "link.png", "up/secret.png", "imgs/../../secret.png"):
        assert reason_of(folder, entry(img_name=name))[0] == "image outside its folder", name
    assert read_one(folder, entry(img_name="inner.png")).image == (folder / "imgs" / "a.png").resolve()


def test_a_missing_or_strange_image_file_is_a_failure(folder: Path) -> None:
    os.mkfifo(folder / "imgs" / "pipe.png")
    (folder / "imgs" / "loop.png").symlink_to("loop.png")
    for name in ("nothing.png", "pipe.png", ".", "loop.png", "x" * 5000):
        assert reason_of(folder, entry(img_name=name))[0] == "image missing", name


def test_images_are_not_looked_for_where_they_are_not_wanted(tmp_path: Path) -> None:
    path = write(tmp_path, entry(img_name="not there.jpg"), root="/nowhere")
    content = Annotations(path, use_images=False)[0]
    assert content.image is None
    assert content.frame == (512, 512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one of {"),
        ("[]", "expected one of {"),
        ('{"data_root": ".", "data_list": [', "is the file complete JSON"),
        ('{"data_root": ".", "data_list": [{"img_name": "a.p', "is the file complete JSON"),
        ('{"data_root": ".", "data_list": [{} {}]}', "expected one of , ]"),
        ('{"data_root": ".", "data_list": {}}', r"expected one of \["),
        ('{"data_root": ".", "data_list": []} x', "something follows"),
        ('{"data_root": "."}', "'data_list' is missing"),
        ('{"data_list": []}', "'data_root' is missing"),
        ('{"data_root": ".", "data_list": [' + "[" * 100_000, "cannot be read|complete JSON"),
        ('{"data_root": ".", "data_list": [{"wm_score": ' + "9" * 5000 + "}]}", "cannot be read"),
    ],
)
def test_a_file_that_is_not_such_json_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        Annotations(path)
    assert not isinstance(caught.value, InputFailure)
    assert str(path) in str(caught.value)


def test_a_file_that_is_missing_or_not_utf8_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        Annotations(tmp_path / "none.json")
    (tmp_path / "latin1.json").write_bytes(b'{"data_root": "caf\xe9", "data_list": []}')
    with pytest.raises(DataError, match="not UTF-8"):
        Annotations(tmp_path / "latin1.json")


def test_a_file_that_changes_while_in_use_is_noticed(folder: Path) -> None:
    path = write(folder, *[entry(caption=f"number {i}") for i in range(5)])
    annotations = Annotations(path)
    text = path.read_text()
    for changed in (text.replace("number 0", "another0"), "#" * len(text), ""):
        path.write_text(changed)
        with pytest.raises(DataError, match="changed while it was in use"):
            annotations[0]
