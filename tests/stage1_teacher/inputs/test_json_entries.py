from __future__ import annotations

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from stage1_teacher.inputs import json_entries
from stage1_teacher.inputs.json_entries import JsonList, read_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


class Entries:
    """What a pass over a file finds, read again one at a time."""

    def __init__(self, path: Path, limit: int = 10**9) -> None:
        self.places: list[tuple[int, int, int]] = []
        self.path, self.limit, self.file = path, limit, path.open("rb")
        self.header, self.complete = JsonList(
            path, list_field="list", other_fields=("root",), keep=self.keep
        ).scan()

    def keep(self, number: int, entry: Any, offset: int, length: int) -> bool:
        self.places.append((number, offset, length))
        return len(self.places) < self.limit

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return read_json(self.path, self.file, *self.places[index][1:])


@settings(max_examples=30, deadline=None)
@given(values=st.lists(JSON, max_size=12), indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
def test_any_list_comes_back_entry_by_entry_whatever_the_chunk(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("json") / "data.json"
    text = json.dumps({"list": values, "root": "é"}, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        for chunk in (7, 64, 1 << 20):
            patch.setattr(json_entries, "_CHUNK_BYTES", chunk)
            entries = Entries(path)
            assert [entries[i] for i in range(len(entries))] == values
            assert entries.header["root"] == "é"


def test_a_byte_order_mark_and_crlf_are_read_over(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b'\xef\xbb\xbf{\r\n"root": 1,\r\n"list":\t[ {"a": "\xc3\xa9"} ,\r\n {"b": 2} ]\r\n}\r\n')
    entries = Entries(path)
    assert [entries[0], entries[1]] == [{"a": "é"}, {"b": 2}]


@pytest.mark.parametrize(("first", "read_to_the_end"), [("root", False), ("list", True)])
def test_reading_stops_once_nothing_more_is_wanted_and_no_field_is_left(
    tmp_path: Path, first: str, read_to_the_end: bool
) -> None:
    path = tmp_path / "data.json"
    values = {"root": 5, "list": [10, [11], {"a": 12}, 13]}
    text = json.dumps({name: values[name] for name in sorted(values, key=lambda name: name != first)})
    path.write_text(text)
    entries = Entries(path, limit=2)
    assert [entries[0], entries[1]] == [10, [11]] and len(entries) == 2
    assert entries.header == {"root": 5} and not entries.complete
    path.write_text(text.replace("13]", "13"))  # wrong further on
    if read_to_the_end:
        with pytest.raises(DataError, match="is the file complete JSON"):
            Entries(path, limit=2)
    else:
        assert len(Entries(path, limit=2)) == 2
    path.write_text(json.dumps(values))
    assert Entries(path, limit=4).complete


def test_threads_may_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    values = [{"n": n, "text": "x" * (n % 50)} for n in range(2000)]
    path.write_text(json.dumps({"root": 0, "list": values}))
    entries = Entries(path)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(entries.__getitem__, range(len(values)))) == values


def test_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    entry = {
        "img_name": "0.jpg",
        "caption": "word " * 40,
        "annotations": [{"text": "a", "polygon": [[1, 2]] * 4}] * 3,
    }
    count = 10_000
    path.write_text(json.dumps({"root": "", "list": [entry] * count}))
    tracemalloc.start()
    entries = Entries(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(entries) == count
    assert path.stat().st_size > 4 << 20
    assert peak < 150 * count + (5 << 20)
