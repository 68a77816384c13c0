"""Faults of the machine are told from bugs and bad data, for real where that can be had."""

from __future__ import annotations

import ast
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from common.config import PROJECT_ROOT
from common.errors import DataError, MachineError
from common.faults import blame, disk_fault, explain, naming, system_error
from common.files import atomic_write, sha256_file

WORKER = """
import os, signal, sys, torch
from torch.utils.data import DataLoader
from common.scripts import run_script
class Data:
    def __len__(self): return 2
    def __getitem__(self, index):
        if sys.argv[1] == "killed": os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(1 << 20)
run_script(lambda: list(DataLoader(Data(), num_workers=1)))
"""
PEERS = """
import datetime, os, sys, time, torch
from common.scripts import run_script
def main():
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=1))
    if torch.distributed.get_rank() == 1:
        time.sleep(0 if sys.argv[1] == "dies" else 2.5)
        os._exit(0)
    torch.distributed.all_reduce(torch.ones(4))
run_script(main)
"""


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EACCES, errno.EROFS, errno.ETIMEDOUT]
)
def test_what_may_pass_is_the_machines_and_names_the_file(number: int) -> None:
    said = explain(OSError(number, os.strerror(number), "a/file"))
    assert said is not None and said[1] == 74
    assert said[0].startswith(f"a/file: {os.strerror(number)}; ") and "run again; what was complete" in said[0]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP])
def test_a_wrong_name_stays_bad_data(number: int) -> None:
    assert explain(OSError(number, os.strerror(number), "a/file")) == (
        f"[Errno {number}] {os.strerror(number)}: 'a/file'",
        3,
    )
    assert blame(OSError(number, "")) is DataError


def test_a_network_without_an_answer_is_the_machines() -> None:
    with pytest.raises(OSError) as refused, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.close()
        socket.create_connection(("127.0.0.1", port))
    for error in (refused.value, TimeoutError("no answer"), socket.gaierror(socket.EAI_AGAIN, "try again")):
        assert blame(error) is MachineError


def test_an_error_that_crossed_from_a_process_or_comes_from_a_library_keeps_its_number(tmp_path: Path) -> None:
    crossed = OSError("Caught OSError in DataLoader worker process 0.\n[Errno 5] Input/output error: 'x'")
    found = system_error(crossed)
    assert found is not None and found.errno == errno.EIO
    with pytest.raises(SafetensorError) as raised:
        save_file({"x": torch.zeros(8)}, str(tmp_path / "no" / "x"))
    found = system_error(raised.value)
    assert found is not None and found.errno == errno.ENOENT


def test_a_bug_keeps_its_traceback() -> None:
    for bug in (ValueError("x"), RuntimeError("shapes do not fit"), AssertionError(), KeyError("x")):
        assert explain(bug) is None and disk_fault(bug) is None
    assert explain(RuntimeError("CUDA error: device-side assert triggered")) is None


@pytest.mark.parametrize(
    "text", ["CUDA error: uncorrectable ECC error encountered", "CUDA error: unspecified launch failure"]
)
def test_a_gpus_fault_is_the_machines(text: str) -> None:
    said = explain(RuntimeError(f"{text}\nCUDA kernel errors might be reported later"))
    assert said is not None and said[1] == 74 and text in said[0] and "another GPU" in said[0]


def test_out_of_memory_is_the_settings_with_the_way_out() -> None:
    with pytest.raises(RuntimeError) as host:
        torch.empty(1 << 58)
    with pytest.raises(MemoryError) as python:
        bytearray(1 << 62)
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total of 79 GiB.")
    for error in (host.value, python.value, gpu):
        said = explain(error)
        assert said is not None and said[1] == 2
        assert "batch_size" in said[0] and "gradient_checkpointing" in said[0]


def test_an_error_of_a_write_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, naming(tmp_path / "x"), Path("/dev/full").open("wb") as file:
        file.write(b"x")
        file.flush()
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "x"))
    with pytest.raises(FileNotFoundError) as missing, atomic_write(tmp_path / "no" / "x"):
        pass
    assert missing.value.filename == str(tmp_path / "no" / "x")
    with pytest.raises(OSError, match=r"Input/output error: '/proc/self/mem'"):
        sha256_file(Path("/proc/self/mem"))


def run(code: str, *arguments: str, prefix: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code, *arguments],
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_lost_process_of_a_run_is_the_machines_fault(how: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    both = [
        run(PEERS, how, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=rank)
        for rank in ("0", "1")
    ]
    _out, said = both[0].communicate(timeout=60)
    both[1].communicate(timeout=60)
    assert both[0].returncode == 74, said
    assert "another process of the run, or the way to it, was lost" in said and "Traceback" not in said


def test_a_loaders_process_that_is_killed_is_the_machines_fault() -> None:
    process = run(WORKER, "killed")
    _out, said = process.communicate(timeout=60)
    assert process.returncode == 74 and "a loader's process died" in said and "Traceback" not in said


def test_shared_memory_that_is_too_small_is_named() -> None:
    own = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k none /dev/shm && exec "$0" "$@"')
    if os.geteuid() != 0 or subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    process = run(WORKER, "", prefix=own)
    _out, said = process.communicate(timeout=60)
    assert process.returncode == 74, said
    assert said.startswith("-c: /dev/shm: No space left on device; free space") and said.count("\n") == 1


def _handlers(tree: ast.AST) -> list[ast.ExceptHandler]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is not None]


def test_no_handler_takes_a_fault_of_the_machine_for_bad_data() -> None:
    """Whoever catches an error of the system and says that data are wrong has asked first whose fault it is."""
    wrong = []
    for package in ("common", "shards", "stage1_teacher", "stage2_student", "both_stages"):
        for path in sorted((PROJECT_ROOT / package).rglob("*.py")):
            for handler in _handlers(ast.parse(path.read_text())):
                assert handler.type is not None
                caught = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
                names = {node.id for part in handler.body for node in ast.walk(part) if isinstance(node, ast.Name)}
                asks = names & {"raise_disk_fault", "disk_fault", "blame"}
                if (
                    caught & {"OSError", "Exception"}
                    and names & {"DataError", "InputFailure", "UsageError"}
                    and not asks
                ):
                    wrong.append(f"{path.relative_to(PROJECT_ROOT)}:{handler.lineno}")
    assert wrong == []
