from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import reason


def test_an_error_of_the_disk_is_told_in_the_systems_words(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:
        (tmp_path / "gone").read_bytes()
    assert reason(raised.value) == "No such file or directory"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("first\nand a trace"), "first"),
        (OSError("no font"), "no font"),
        (EOFError(), "EOFError"),
        (KeyError("name"), "'name'"),
    ],
)
def test_any_other_error_is_told_by_its_first_line_or_else_its_type(error: Exception, said: str) -> None:
    assert reason(error) == said
