from __future__ import annotations

from pathlib import Path

import pytest

from stage2_student.evaluation.invocation import INVOCATIONS_FILE, note_invocation, read_invocations


def noted(folder: Path) -> list[str]:
    return [line["command"] for line in read_invocations(folder)]


def test_commands_are_read_back_as_they_were_given(tmp_path: Path) -> None:
    assert read_invocations(tmp_path) == []
    note_invocation(tmp_path / "new", ["pipeline.py", "evaluate", "--out", "some where"], {"a": {"b": 1}})
    note_invocation(tmp_path / "new", ["pipeline.py", "evaluate"], {})
    assert noted(tmp_path / "new") == ["pipeline.py evaluate --out 'some where'", "pipeline.py evaluate"]
    first = read_invocations(tmp_path / "new")[0]
    assert first["config"] == {"a": {"b": 1}}
    assert "cores" in first["machine"] and first["packages"]["numpy"]


@pytest.mark.parametrize("torn", [b'{"command":"pipe', b"{", b"[1]", b"{}", b'"\xff'])
def test_a_torn_line_is_left_out_and_does_not_swallow_the_next(tmp_path: Path, torn: bytes) -> None:
    note_invocation(tmp_path, ["one"], {})
    with (tmp_path / INVOCATIONS_FILE).open("ab") as file:
        file.write(torn)
    assert noted(tmp_path) == ["one"]
    note_invocation(tmp_path, ["two"], {})
    assert noted(tmp_path) == ["one", "two"]
    assert (tmp_path / INVOCATIONS_FILE).read_bytes().count(b"\n") == 2
