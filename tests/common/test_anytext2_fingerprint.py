from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.anytext2 import fingerprint as module
from common.anytext2.checkpoint import write_checkpoint
from common.anytext2.fingerprint import fingerprint

TENSORS: dict[str, Tensor] = {
    "model.diffusion_model.a": torch.arange(6.0).reshape(2, 3),
    "control_model.b": torch.ones(2, dtype=torch.float16),
    "text_predictor.count": torch.tensor(7),
}


def both(path: Path) -> tuple[str, str]:
    return fingerprint(path, "teacher"), fingerprint(path, "base")


def test_all_formats_of_one_model_have_one_fingerprint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.ckpt", TENSORS)
    write_checkpoint(tmp_path / "a.safetensors", TENSORS)
    (tmp_path / "folder").mkdir()
    for number, key in enumerate(TENSORS):
        write_checkpoint(tmp_path / "folder" / f"{number}.safetensors", {key: TENSORS[key]})
    prints = {both(tmp_path / name) for name in ("a.ckpt", "a.safetensors", "folder")}
    assert len(prints) == 1
    teacher, base = prints.pop()
    assert teacher != base


def test_a_change_of_value_type_shape_or_name_changes_it(tmp_path: Path) -> None:
    key = "model.diffusion_model.a"
    value = TENSORS[key]
    changes: list[dict[str, Tensor]] = [
        TENSORS,
        {**TENSORS, key: torch.nextafter(value, value + 1)},
        {**TENSORS, key: value.view(torch.int32)},
        {**TENSORS, key: value.reshape(3, 2)},
        {**{k: v for k, v in TENSORS.items() if k != key}, key + "x": value},
    ]
    prints = set()
    for number, tensors in enumerate(changes):
        write_checkpoint(tmp_path / f"{number}.safetensors", tensors)
        prints.update(both(tmp_path / f"{number}.safetensors"))
    assert len(prints) == 2 * len(changes)


def test_the_base_ignores_what_the_student_has_not(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.safetensors", TENSORS)
    write_checkpoint(tmp_path / "b.safetensors", {**TENSORS, "text_predictor.count": torch.tensor(8)})
    a, b = both(tmp_path / "a.safetensors"), both(tmp_path / "b.safetensors")
    assert a[1] == b[1]
    assert a[0] != b[0]


def test_position_ids_that_only_some_files_hold_do_not_count(tmp_path: Path) -> None:
    extra = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    write_checkpoint(tmp_path / "a.safetensors", TENSORS)
    write_checkpoint(tmp_path / "b.safetensors", {**TENSORS, extra: torch.arange(77)[None]})
    assert both(tmp_path / "a.safetensors") == both(tmp_path / "b.safetensors")


def test_it_is_computed_once_while_the_file_stays_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    real = module._compute
    monkeypatch.setattr(module, "_compute", lambda file: computed.append(1) or real(file))
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, TENSORS)
    first = both(path)
    assert both(path) == first
    assert len(computed) == 1
    write_checkpoint(path, {**TENSORS, "control_model.b": torch.zeros(2, dtype=torch.float16)})  # same size
    os.utime(path, ns=(1, 1))
    assert both(path) != first
    assert len(computed) == 2


@pytest.mark.parametrize("garbage", [b"", b"{}", b"[]", b"\xff", b'{"stamp": 1, "teacher": 2, "base": 3}'])
def test_a_damaged_cache_is_computed_anew(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, TENSORS)
    expected = both(path)
    (tmp_path / "a.safetensors.fingerprint.json").write_bytes(garbage)
    assert both(path) == expected


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, TENSORS)

    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))  # the tests may run as root

    monkeypatch.setattr(module, "write_bytes_atomic", refuse)
    assert len(fingerprint(path, "teacher")) == 64
    assert list(tmp_path.iterdir()) == [path]
