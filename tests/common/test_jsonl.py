from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.jsonl import LineWriter, read_lines, read_objects


def test_lines_come_back_as_written_and_a_missing_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    assert read_lines(path) == read_objects(path) == []
    with LineWriter[dict[str, int]](path) as writer:
        writer.append({"b": 1, "a": 2}, {"a": 3})
        assert read_objects(path) == [{"a": 2, "b": 1}, {"a": 3}]  # before it is closed, too
        writer.append()
    assert path.read_bytes() == b'{"a":2,"b":1}\n{"a":3}\n'


@pytest.mark.parametrize("torn", [b"{", b'{"a": 1}', b'"\xff'])
def test_a_torn_last_line_is_left_out_and_cut_off_before_the_next(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a":1}\n' + torn)
    assert read_lines(path) == [b'{"a":1}']
    with LineWriter[dict[str, int]](path) as writer:
        writer.append({"a": 2})
    assert path.read_bytes() == b'{"a":1}\n{"a":2}\n'


def test_what_is_no_object_is_left_out_of_the_objects_but_not_of_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":\n[1]\n\n{"a":2}\n')
    assert read_objects(path) == [{"a": 1}, {"a": 2}]
    assert read_lines(path) == [b'{"a":1}', b'{"a":', b"[1]", b"", b'{"a":2}']


@pytest.mark.parametrize("durable", [False, True])
def test_only_a_durable_file_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with LineWriter[int](tmp_path / "log.jsonl", durable=durable) as writer:
        writer.append(1)
    assert bool(synced) is durable
