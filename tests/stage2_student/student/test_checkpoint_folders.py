from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import DataError
from stage2_student.student.checkpoint_folders import (
    damage,
    list_checkpoints,
    newest_checkpoint,
    prune,
    require_complete,
    save_checkpoint,
)


def fill(content: bytes = b"abc"):  # type: ignore[no-untyped-def]
    def write(folder: Path) -> None:
        (folder / "lora" / "unet").mkdir(parents=True)
        (folder / "lora" / "unet" / "weights").write_bytes(content)
        (folder / "state.json").write_bytes(b"{}")

    return write


def test_a_checkpoint_is_complete_under_its_name_and_nothing_else_is_left(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoints", 12, fill())
    assert checkpoint.name == "step-00000012" and damage(checkpoint) == ""
    assert list((tmp_path / "checkpoints").iterdir()) == [checkpoint]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill()(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 1, fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("injure", "said"),
    [
        (lambda c: (c / "lora/unet/weights").write_bytes(b"abd"), "lora/unet/weights does not match"),
        (lambda c: (c / "lora/unet/weights").write_bytes(b"ab"), "lora/unet/weights does not match"),
        (lambda c: (c / "lora/unet/weights").unlink(), "weights is missing"),
        (lambda c: (c / "checkpoint.json").unlink(), "checkpoint.json is missing"),
        (lambda c: (c / "checkpoint.json").write_bytes(b'{"step": 2, "fi'), "checkpoint.json is unreadable"),
        (lambda c: (c / "checkpoint.json").write_bytes(b'{"step": 9, "files": {}}'), "is of step 9"),
    ],
)
def test_the_newest_complete_checkpoint_is_found_by_content(tmp_path: Path, injure, said: str) -> None:  # type: ignore[no-untyped-def]
    older, newer = (save_checkpoint(tmp_path, step, fill()) for step in (1, 2))
    assert newest_checkpoint(tmp_path) == newer
    injure(newer)
    assert said in damage(newer)
    assert newest_checkpoint(tmp_path) == older
    with pytest.raises(DataError, match="use an older one"):
        require_complete(newer)
    assert require_complete(older) == older


def test_a_damaged_checkpoint_is_replaced_and_a_complete_one_kept(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, 1, fill(b"first"))
    save_checkpoint(tmp_path, 1, fill(b"second"))
    assert (checkpoint / "lora/unet/weights").read_bytes() == b"first"
    (checkpoint / "state.json").unlink()
    save_checkpoint(tmp_path, 1, fill(b"third"))
    assert damage(checkpoint) == "" and (checkpoint / "lora/unet/weights").read_bytes() == b"third"


def test_pruning_counts_complete_checkpoints_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, fill())
    prune(tmp_path, keep=9)  # all were complete then
    (tmp_path / "step-00000003/state.json").write_bytes(b"[]")
    prune(tmp_path, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    save_checkpoint(tmp_path, 4, fill())
    prune(tmp_path, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004"]


def test_pruning_keeps_the_newest_and_removes_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10):
        save_checkpoint(tmp_path, step, fill())
    (tmp_path / ".step-00000011.1-a.tmp").mkdir()
    prune(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]
    assert len(list(tmp_path.iterdir())) == 2


def test_no_checkpoint_is_found_where_none_is(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None
    (tmp_path / "step-abc").mkdir()
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(DataError, match="not a checkpoint"):
        require_complete(tmp_path / "elsewhere")
