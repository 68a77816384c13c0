"""A fault of the machine ends every command with 74 and one line that names the file; none counts as damage."""

from __future__ import annotations

import http.server
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner, Result

from common.config import PROJECT_ROOT
from pipeline import cli
from shards.remote import connection
from stage2_student.student.checkpoint_folders import list_checkpoints
from tests.small_disk import small_disk as mounted
from tests.stage1_teacher.small_teacher import write_prompts, write_teacher

UNREADABLE = Path("/proc/self/mem")
"""It opens, and reading its start fails with EIO."""
TRAINING = ("train.num_phases=2", "train.max_steps=3", "train.batch_size=2", "train.num_workers=0",
            "lora.rank=2", "train.checkpoint_every=1")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A set, and a run trained on it."""

    config: Path
    prompts: Path
    shards: Path
    run: Path


def call(*arguments: object, sets: tuple[str, ...] = ()) -> Result:
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = [flag for value in sets for flag in ("--set", value)]
    return CliRunner().invoke(cli, [*map(str, arguments), *flags])


def assert_fault(result: Result, *said: object, code: int = 74) -> None:
    """Check that a command ended with one line, which says this."""
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert (result.exit_code, len(errors)) == (code, 1), (result.output, result.exception)
    assert "Traceback" not in result.output
    for part in said:
        assert str(part) in errors[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("faults")
    torch.set_num_threads(1)
    made = Place(
        config=write_teacher(folder),
        prompts=write_prompts(folder / "prompts.jsonl", 5),
        shards=folder / "shards",
        run=folder / "run",
    )
    done = call("precompute", "--config", made.config, "--prompts", made.prompts, "--out", made.shards)
    assert done.exit_code == 0, done.output
    done = call("train", "--config", made.config, "--shards", made.shards, "--out", made.run, sets=TRAINING)
    assert done.exit_code == 0, done.output
    return made


@pytest.fixture
def copied(place: Place, tmp_path: Path) -> Path:
    """A copy of the set."""
    return Path(shutil.copytree(place.shards, tmp_path / "copy"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 192 KiB."""
    with mounted(tmp_path / "disk", "size=192k") as folder:
        yield folder


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Have the system refuse to write files of more bytes, as `ulimit -f` does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Disks that are full


def test_a_disk_that_fills_up_ends_training_and_with_more_space_it_goes_on(place: Place, disk: Path) -> None:
    train = partial(call, "train", "--config", place.config, "--shards", place.shards, "--out", disk / "run")
    assert_fault(train(sets=TRAINING), disk / "run", "No space left on device", "free space", "run again")
    whole = list_checkpoints(disk / "run" / "checkpoints")
    assert list((disk / "run").rglob("*.tmp")) == []
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    done = train("--resume", "auto", sets=TRAINING)
    assert done.exit_code == 0, done.output
    assert len(list_checkpoints(disk / "run" / "checkpoints")) > len(whole)


@pytest.mark.parametrize("size", [4, 24, 40, 96])
def test_however_small_the_disk_the_line_names_what_did_not_fit(place: Place, disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
    made = ("precompute", "--config", place.config, "--prompts", place.prompts, "--out", disk / "set")
    trained = ("train", "--config", place.config, "--shards", place.shards, "--out", disk / "run")
    for arguments, sets in (
        (trained, TRAINING),
        ((*made, "--trajectories", disk / "rollouts"), ()),
        (("upload", "--shards", place.shards, "--to", f"file://{disk}/there"), ()),
    ):
        assert_fault(call(*arguments, sets=sets), f"error: {disk}/", "No space left on device")
        for left in disk.iterdir():
            shutil.rmtree(left)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("merged", "out.safetensors"),
        ("merged", "out.ckpt"),
        ("diffusers", "out.safetensors"),
        ("kohya", "k.safetensors"),
    ],
)
def test_an_export_that_finds_no_space_names_its_file_and_leaves_none(
    place: Place, tmp_path: Path, kind: str, name: str
) -> None:
    out = tmp_path / "out" / name
    out.parent.mkdir()
    with no_file_above(4096):
        result = call("export", "--config", place.config, "--adapter", place.run, "--format", kind, "--out", out)
    assert_fault(result, f"{out}: File too large", "raise the limit")
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("limit", [512, 2048, 30_000])
def test_a_checkpoint_that_finds_no_space_is_told_by_its_file(place: Place, tmp_path: Path, limit: int) -> None:
    with no_file_above(limit):
        result = call(
            "train", "--config", place.config, "--shards", place.shards, "--out", tmp_path / "run", sets=TRAINING
        )
    assert_fault(result, tmp_path / "run", "File too large")


def test_precompute_and_pictures_find_no_space(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    with no_file_above(2048):
        made = call("precompute", "--config", place.config, "--prompts", place.prompts, "--out", tmp_path / "set")
        drawn = call("sample", "--config", place.config, "--adapter", place.run, "--record", 0,
                     "--shards", place.shards, "--out", out)  # fmt: skip
        sheet = call("inspect", "--config", place.config, "--shards", place.shards, "--out", out)
    assert_fault(made, tmp_path / "set", "File too large")
    assert_fault(drawn, out, "File too large")
    assert_fault(sheet, out, "File too large")


# Disks that fail, and files that this user may not read


@pytest.mark.parametrize("option", ["--annotations", "--prompts", "--config"])
def test_an_input_that_the_disk_does_not_give_is_not_bad_data(place: Place, tmp_path: Path, option: str) -> None:
    (tmp_path / "file").symlink_to(UNREADABLE)
    given = {"--config": place.config, "--prompts": place.prompts} | {option: tmp_path / "file"}
    if option == "--annotations":
        del given["--prompts"]
    result = call("precompute", *(part for pair in given.items() for part in pair), "--out", tmp_path / "set")
    assert_fault(result, tmp_path / "file", "Input/output error")


@pytest.mark.parametrize("name", ["manifest.json", "uncond.safetensors", "plan/000000.txt", "shard-000001.json"])
@pytest.mark.parametrize("command", ["verify", "status", "finalize", "inspect", "train", "exclude"])
def test_a_set_that_the_disk_does_not_give_is_not_damaged(
    place: Place, copied: Path, tmp_path: Path, name: str, command: str
) -> None:
    (copied / name).unlink()
    (copied / name).symlink_to(UNREADABLE)
    arguments: list[object] = [command, "--shards", copied]
    if command in ("train", "exclude"):
        exclude = ["--exclude-damaged"] if command == "exclude" else []
        arguments = ["train", *exclude, "--config", place.config, "--shards", copied, "--out", tmp_path / "run"]
    result = call(*arguments, sets=TRAINING if arguments[0] == "train" else ())
    if command == "status" and name == "uncond.safetensors":
        assert result.exit_code == 0  # it does not read it
    else:
        assert_fault(result)
        assert name in result.output and "precompute" not in result.output.partition("error: ")[2]


def test_verify_names_all_damage_beside_what_it_could_not_read(copied: Path) -> None:
    (copied / "shard-000001.json").unlink()
    (copied / "shard-000001.json").symlink_to(UNREADABLE)
    shard = copied / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-100] + b"x" * 100)
    result = call("verify", "--shards", copied)
    assert_fault(result, "1 files could not be read, 1 damages found")
    assert "the end of the archive is damaged" in result.output


def test_a_checkpoint_that_the_disk_does_not_give_is_neither_passed_over_nor_deleted(
    place: Place, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(place.run, tmp_path / "run"))
    newest = list_checkpoints(run / "checkpoints")[-1]
    (newest / "checkpoint.json").unlink()
    (newest / "checkpoint.json").symlink_to(UNREADABLE)
    before = list_checkpoints(run / "checkpoints")
    result = call("train", "--config", place.config, "--shards", place.shards, "--out", run, "--resume", "auto",
                  sets=TRAINING)  # fmt: skip
    assert_fault(result, newest, "Input/output error")
    assert list_checkpoints(run / "checkpoints") == before


def test_a_file_without_permission_is_the_machines_fault(copied: Path) -> None:
    (copied / "manifest.json").chmod(0)
    command = [sys.executable, "pipeline.py", "status", "--shards", str(copied)]
    if os.geteuid() == 0:  # which may read everything, unless this right is taken from it
        rights = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *command]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 127 or "setpriv" in done.stderr:
        pytest.skip("this machine's root may not give up rights")
    assert done.returncode == 74, done.stderr
    assert done.stderr.startswith(
        f"error: {copied / 'manifest.json'}: Permission denied; give this user the right"
    )
    assert done.stderr.count("\n") == 1


def test_a_file_that_is_not_there_stays_bad_data(place: Place, tmp_path: Path) -> None:
    result = call("precompute", "--config", place.config, "--prompts", tmp_path / "no", "--out", tmp_path / "set")
    assert_fault(result, tmp_path / "no", "No such file", code=3)


# Servers


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, badly."""

    def __init__(self, *args: Any, answer: str, **kwargs: Any) -> None:
        self.answer = answer
        super().__init__(*args, **kwargs)

    def log_message(self, *_args: object) -> None:
        pass

    def do_GET(self) -> None:
        status, _, only = self.answer.partition(" ")
        if status.isdigit() and self.path.endswith(only):
            self.send_error(int(status))
        else:
            super().do_GET()


@pytest.fixture
def online(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Serves the set; the argument is a status, and perhaps the end of the paths that get it."""
    monkeypatch.setattr(connection, "_FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setenv("SHARD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")

    @contextmanager
    def serve(answer: str) -> Iterator[str]:
        handler = partial(Server, answer=answer, directory=str(place.shards))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    return serve


@pytest.mark.parametrize("answer", ["403", "500", "403 .tar", "500 shard-000001.json", "403 uncond.safetensors"])
def test_a_set_that_a_server_does_not_give_is_not_damaged(online: Any, answer: str) -> None:
    with online(answer) as url:
        result = call("verify", "--shards", url)
    assert_fault(result, url)
    assert "check the connection and the credentials" in result.output
    assert "precompute" not in result.output and answer[:3] in result.output


def test_a_server_that_is_not_there_and_credentials_that_are_missing_are_no_damage(
    online: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with online("403") as url:
        pass
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    for where in (url, "s3://nobodys/set"):
        result = call("verify", "--shards", where)
        assert_fault(result, where, "check the connection and the credentials")
        assert "precompute" not in result.output


def test_a_set_of_which_nothing_can_be_used_is_not_mended_by_precompute(copied: Path) -> None:
    (copied / "manifest.json").write_text("<html>please log in</html>")
    result = call("verify", "--shards", copied)
    assert_fault(result, "1 damage found", code=3)
    assert "restore it from a copy" in result.output and "precompute" not in result.output


def test_an_unknown_protocol_is_a_wrong_option() -> None:
    assert_fault(call("verify", "--shards", "foo://set"), "foo://set: cannot be opened", code=2)


def test_training_on_a_server_that_fails_leaves_nothing_out(place: Place, online: Any, tmp_path: Path) -> None:
    with online("403 .tar") as url:
        result = call("train", "--exclude-damaged", "--config", place.config, "--shards", url,
                      "--out", tmp_path / "run", sets=TRAINING)  # fmt: skip
    assert_fault(result, url, "403")


def test_a_shard_that_is_short_at_the_server_is_damaged_there(place: Place, online: Any) -> None:
    shard = place.shards / "shard-000000.tar"
    whole = shard.read_bytes()
    try:
        with online("none") as url:
            shard.write_bytes(whole[:20_000])
            result = call("verify", "--shards", url)
    finally:
        shard.write_bytes(whole)
    assert_fault(result, "1 damage found", code=3)
    assert f"20000 bytes there, expected {len(whole)}" in result.output and "upload it again" in result.output


def test_a_cache_whose_disk_is_full_is_told_by_its_folder(online: Any, tmp_path: Path) -> None:
    with online("none") as url, no_file_above(4096):
        result = call("verify", "--shards", url)
    assert_fault(result)
    assert str(tmp_path / "cache") in result.output and "File too large" in result.output


# What nobody reads


def quietly_closed(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a program whose standard output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            command, cwd=PROJECT_ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)


def test_a_closed_pipe_ends_quietly(place: Place) -> None:
    print_much = "from common.scripts import run_script; run_script(lambda: print('x'))"
    for command in (
        ["pipeline.py", "--help"],
        ["pipeline.py", "status", "--shards", str(place.shards)],
        ["pipeline.py", "--debug", "inspect", "--shards", str(place.shards)],
        ["-c", print_much],
    ):
        done = quietly_closed(sys.executable, *command)
        assert (done.returncode, done.stderr) == (141, ""), command


def test_a_full_disk_behind_standard_output_is_told(place: Place) -> None:
    command = [sys.executable, "pipeline.py", "status", "--shards", str(place.shards)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=PROJECT_ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 74
    assert done.stderr.startswith("error: standard output: No space left on device; free space"), done.stderr
