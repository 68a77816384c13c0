from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import pipeline
from both_stages.doctor import machine
from both_stages.doctor.finding import Finding, examine
from both_stages.doctor.folder import check_folder, check_space
from both_stages.doctor.given import check_checkpoint, check_credentials
from common.config import Config, load_config
from common.errors import MachineError
from tests.shards.builders import input_ids, write_set
from tests.small_disk import small_disk as mounted
from tests.stage1_teacher.small_teacher import write_teacher


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def config(config_path: Path) -> Config:
    return load_config(config_path)


def doctor(*words: object) -> Result:
    return CliRunner().invoke(pipeline.cli, ["doctor", *map(str, words)])


def by_check(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_a_sound_machine_is_found_sound_and_nothing_is_left_behind(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = doctor("--config", config_path, "--shards", tmp_path / "set", "--inputs", 100, "--json",
                    "--upload", f"file://{tmp_path}")  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    levels = {each["check"]: each["level"] for each in found["findings"]}
    expected = (
        "rename",
        "hard links",
        "flock",
        "space",
        "threads",
        "checkpoint",
        "tokenizer",
        "fonts",
        "credentials",
    )
    assert {levels[check] for check in expected} == {"ok"}
    assert levels["GPU"] == "warning"  # the configuration asks for none
    assert found["exit_code"] == 0
    assert list(tmp_path.iterdir()) == []


def test_every_fault_is_named_and_the_first_one_decides_the_exit_code(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "pointer.ttf").write_text("version https://git-lfs.github.com/spec/v1\n")
    result = doctor(
        "--config", config_path, "--shards", tmp_path, "--inputs", 10**12,
        "--set", "model.checkpoint=none.ckpt", "--set", f"inputs.font={tmp_path / 'pointer.ttf'}",
        "--set", "model.clip=", "--set", "model.device=cuda", "--upload", "s4://bucket/set",
    )  # fmt: skip
    faults = [line.split(maxsplit=2)[1:] for line in result.output.splitlines() if line.startswith("fault")]
    assert [check for check, _said in faults] == [
        "space", "checkpoint", "tokenizer", "fonts", "credentials", *(["GPU"] * (not torch.cuda.is_available())),
    ]  # fmt: skip
    said = dict(faults)
    assert "free space, or choose another folder" in said["space"]
    assert "none.ckpt" in said["checkpoint"]
    assert "git lfs pull" in said["fonts"]
    assert "s4" in said["credentials"]
    assert result.exit_code == 74


def test_a_fault_of_what_is_given_ends_with_its_own_code(config_path: Path, tmp_path: Path) -> None:
    result = doctor("--config", config_path, "--shards", tmp_path, "--set", "model.checkpoint=none.ckpt")
    assert result.exit_code == 3


def test_a_folder_without_hard_links_cannot_hold_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_paths: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    found = by_check(check_folder(tmp_path))
    assert (found["hard links"].level, found["hard links"].exit_code) == ("fault", 74)
    assert "no hard links (Operation not permitted), by which tasks commit" in found["hard links"].said


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_folder_without_locks_can_and_the_doctor_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    found = by_check(check_folder(tmp_path))
    assert found["flock"].level == "warning"
    assert "all works without it" in found["flock"].said


def test_a_lock_that_keeps_nobody_out_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_arguments: None)  # as where locks are each machine's own
    found = by_check(check_folder(tmp_path))
    assert "two processes hold one lock" in found["flock"].said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB and few files."""
    with mounted(tmp_path / "disk", "size=1m,nr_inodes=64") as folder:
        yield folder


def test_space_and_files_are_compared_with_what_the_set_needs(small_disk: Path, config: Config) -> None:
    assert by_check(check_space(small_disk, config, 10))["space"].level == "ok"
    with pytest.raises(
        MachineError, match=r"1\.\d MB free, 1,000 inputs need 1\d\.\d MB in 668 files; free space"
    ):
        list(check_space(small_disk, config, 1000))
    one_each = config.replace(shards=config.shards.replace(samples_per_shard=1))
    with pytest.raises(MachineError, match=r"only \d+ more files fit; raise shards.samples_per_shard"):
        list(check_space(small_disk, one_each, 40))
    assert "give --inputs N" in by_check(check_space(small_disk, config, None))["space"].said


def test_of_a_set_that_was_begun_only_what_is_missing_is_asked_for(tmp_path: Path, config: Config) -> None:
    write_set(tmp_path, input_ids(12), samples_per_shard=3)
    for path in tmp_path.glob("shard-000002.*"):
        path.unlink()
    assert " 3 inputs need " in by_check(check_space(tmp_path, config, None))["space"].said
    assert " 23 inputs need " in by_check(check_space(tmp_path, config, 32))["space"].said


def test_little_shared_memory_is_a_warning_of_nccl_alone(tmp_path: Path) -> None:
    (found,) = machine.check_shared_memory(tmp_path, enough=1 << 62)
    assert found.level == "warning"
    assert "--shm-size" in found.said
    (found,) = machine.check_shared_memory(tmp_path / "none")
    assert "there is none; one process needs none" in found.said


def test_threads_that_are_not_pinned_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (found,) = machine.check_threads()
    assert (found.level, "set it" in found.said) == ("warning", True)


def test_a_driver_without_a_torch_for_it_is_a_fault(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch finds this machine's GPU")
    (tmp_path / "driver").touch()
    monkeypatch.setattr(machine, "_DRIVERS", (str(tmp_path / "driver"),))
    auto = config.replace(model=config.model.replace(device="auto"))
    with pytest.raises(MachineError, match="install a torch for the driver"):
        list(machine.check_gpu(auto))


def test_a_checkpoint_whose_fingerprint_cannot_be_kept_is_a_warning(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(config_path.parent, tmp_path / "teacher")
    (tmp_path / "teacher" / "teacher.safetensors.fingerprint.json").unlink(missing_ok=True)
    config = load_config(tmp_path / "teacher" / "config.toml")
    assert by_check(check_checkpoint(config))["checkpoint"].level == "ok"
    monkeypatch.setattr(os, "access", lambda *_arguments: False)  # root may write anywhere
    (found,) = check_checkpoint(config)
    assert found.level == "warning"
    assert "every task hashes the file" in found.said


def test_a_bucket_is_written_read_and_left_clean(tmp_path: Path) -> None:
    (found,) = check_credentials(f"file://{tmp_path}")
    assert found.level == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback() -> None:
    def broken() -> Iterator[Finding]:
        raise KeyError("x")
        yield

    check: Callable[[], Iterator[Finding]] = broken
    with pytest.raises(KeyError):
        list(examine("x", check))
