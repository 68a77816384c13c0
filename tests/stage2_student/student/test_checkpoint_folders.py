from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from common.errors import DataError
from stage2_student.student.checkpoint_folders import (
    damage,
    is_pruned,
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


STRIP = ("state.json",)


def test_pruning_may_leave_older_checkpoints_their_adapters_to_read_but_not_to_resume_from(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, fill())
    prune(tmp_path, keep=1, strip=STRIP)
    one, two, three = list_checkpoints(tmp_path)
    for older in (one, two):
        assert is_pruned(older) and damage(older) == ""
        assert (older / "lora/unet/weights").read_bytes() == b"abc" and not (older / "state.json").exists()
        assert require_complete(older) == older
        with pytest.raises(DataError, match=r"only its adapter is left .* start a new run with --from"):
            require_complete(older, to_resume=True)
    assert not is_pruned(three) and (three / "state.json").exists()
    assert newest_checkpoint(tmp_path, to_resume=True) == three
    (two / "lora/unet/weights").write_bytes(b"abd")
    assert "weights does not match" in damage(two)

    (three / "state.json").unlink()  # damaged: the newest adapter that is whole is one to sample with
    assert newest_checkpoint(tmp_path) == one
    with pytest.raises(DataError, match=r"none of its 1 checkpoints is complete \(step-00000003"):
        newest_checkpoint(tmp_path, to_resume=True)
    shutil.rmtree(three)
    with pytest.raises(DataError, match=r"of its 2 checkpoints only the adapters are left"):
        newest_checkpoint(tmp_path, to_resume=True)


def test_stripped_checkpoints_do_not_count_and_are_removed_when_no_adapters_are_to_be_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, fill())
        prune(tmp_path, keep=2, strip=STRIP)
    assert [is_pruned(checkpoint) for checkpoint in list_checkpoints(tmp_path)] == [True, True, False, False]
    save_checkpoint(tmp_path, 2, fill())  # a run that came by there again
    assert not is_pruned(list_checkpoints(tmp_path)[1])
    prune(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_a_damaged_older_checkpoint_is_not_kept_for_its_adapter(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, fill())
    (tmp_path / "step-00000001/lora/unet/weights").write_bytes(b"abd")
    prune(tmp_path, keep=1, strip=STRIP)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]


def test_a_process_killed_while_it_strips_leaves_nothing_that_could_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, fill())

    def killed(path: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, keep=1, strip=STRIP)
    older = tmp_path / "step-00000001"
    assert (older / "state.json").exists() and is_pruned(older) and damage(older) == ""
    prune(tmp_path, keep=1, strip=STRIP)
    assert not (older / "state.json").exists()


def test_a_reader_whom_pruning_overtakes_sees_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, fill())
    older, read = tmp_path / "step-00000001", Path.read_bytes

    def read_and_be_overtaken(path: Path) -> bytes:
        content = read(path)
        monkeypatch.undo()
        prune(tmp_path, keep=1, strip=STRIP)
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_be_overtaken)
    assert damage(older) == ""
    assert is_pruned(older)


def test_no_checkpoint_is_found_where_none_is(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None
    (tmp_path / "step-abc").mkdir()
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(DataError, match="not a checkpoint"):
        require_complete(tmp_path / "elsewhere")
