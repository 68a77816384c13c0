from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from common.files import atomic_write, canonical_json, create_once, sha256_file, write_bytes_atomic


def test_a_write_that_fails_leaves_the_old_content_and_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes_atomic(path, b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_create_once_never_replaces_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert create_once(path, b"first")
    assert not create_once(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def _race(path: Path, value: int) -> bool:
    return create_once(path, str(value).encode() * 10_000)


def test_exactly_one_of_racing_processes_creates_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        created = pool.starmap(_race, [(path, value) for value in range(8)])
    assert sum(created) == 1
    assert path.read_bytes() == str(created.index(True)).encode() * 10_000


def test_canonical_json_is_one_spelling_and_refuses_nan() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}\n'.encode()
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))


def test_sha256_of_the_empty_file_is_the_known_one(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert sha256_file(path).startswith("e3b0c44298fc1c14")
