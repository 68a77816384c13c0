"""Telling a fault of the machine, which may pass, from data that is wrong, which stays so.

A disk's error comes as an `OSError`, or as a type of a library's own that has only its text: both are told by the
system's number. Of what torch raises for a GPU, for memory and for a lost process only the text says what it is.
"""

from __future__ import annotations

import concurrent.futures
import errno
import logging
import os
import re
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from common.errors import AppError, DataError, MachineError, UsageError, reason

PIPE_CLOSED = 141
"""How a shell counts a program that SIGPIPE ended."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_WRONG = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG),
        *(errno.ELOOP, errno.EINVAL, errno.EILSEQ, errno.EXDEV, errno.ENXIO, errno.ESPIPE, errno.EBADF),
        *(errno.EOPNOTSUPP, errno.ENOSYS),
    }
)
"""What the system says of a wrong name or file; it will say so again."""

_SAFE = "then run again; what was complete before is untouched"
_NUMBERS = (
    r"\[Errno (\d+)\]",  # an OSError that crossed from a worker process is its text
    r"\(os error (\d+)\)",  # safetensors and tokenizers
    r"unable to .*</torch_.*: [\w ,/]+ \((\d+)\)$",  # torch's shared memory
)

_MEMORY = re.compile(
    r"out of memory|_STATUS_ALLOC_FAILED|can't allocate memory|not enough memory|cudaErrorMemoryAllocation"
)
_GPU = re.compile(
    r"(CUDA|HIP|NVML) error(?!: (device-side assert|invalid |no kernel image|misaligned|operation not))"
    r"|_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR|EXECUTION_FAILED)|No CUDA GPUs are available"
)
_PEER = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)( by peer)?|TCPStore|Socket Timeout|Timed out waiting|Broken pipe"
)
_WORKER = re.compile(r"DataLoader worker .* (exited|killed)|shared memory")


def system_error(error: BaseException) -> OSError | None:
    """Return the system's error that an exception is, tells of in its text, or was raised because of."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, AppError):
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen
        if isinstance(seen, OSError | RuntimeError) or type(seen).__name__ == "SafetensorError":
            for pattern in _NUMBERS:
                if found := re.search(pattern, str(seen), re.MULTILINE):
                    number, file = int(found[1]), "/dev/shm" if "</torch_" in found[0] else None
                    return OSError(number, os.strerror(number), file)
        seen = seen.__cause__ or seen.__context__
    return None


def disk_fault(error: BaseException, where: str | Path = "") -> MachineError | None:
    """Return what to raise if a disk, a connection or the rights on a file failed; None if what was read is wrong.

    Args:
        error: what was caught.
        where: what was read or written, beside the file that the error names.
    """
    found = system_error(error)
    if found is None and isinstance(error, ConnectionError | TimeoutError):
        found = error  # a library's, without a number
    if found is None or found.errno in _WRONG:
        return None
    if found.errno in _FULL:
        remedy = f"free space or raise the limit, {_SAFE}"
    elif found.errno in _NOT_ALLOWED:
        remedy = f"give this user the right to it, {_SAFE}"
    else:
        remedy = f"mend the disk or the connection, {_SAFE}"
    name = found.filename2 if found.errno in _FULL and found.filename2 else found.filename  # a copy's target
    file = os.fsdecode(name) if isinstance(name, str | bytes) else ""
    named = ", ".join(part for part in (str(where), file if file not in str(where) else "") if part)
    return MachineError(f"{named}: {reason(found)}; {remedy}" if named else f"{reason(found)}; {remedy}")


def raise_disk_fault(error: BaseException, where: str | Path = "") -> None:
    """Raise a fault of the machine as one; for handlers that go on to say what is wrong with what was read.

    Raises:
        MachineError: see `disk_fault`.
    """
    if fault := disk_fault(error, where):
        raise fault from error


def blame(error: BaseException) -> type[MachineError] | type[DataError]:
    """Return the kind of error to raise instead of another: the machine's, or the data's."""
    return DataError if disk_fault(error) is None else MachineError


@contextmanager
def naming(path: Path, *, temporary: Path | None = None) -> Iterator[None]:
    """Have an error of the disk name a file, whichever library met it, as an `OSError` with the system's number.

    Args:
        path: the file or folder that is written.
        temporary: under which name, which says nothing to a reader of the error.
    """
    try:
        yield
    except AppError:
        raise
    except Exception as error:
        found = system_error(error)
        if found is None or (found.filename is not None and not _is_in(temporary, found.filename)):
            raise
        found.filename = str(path)
        if found is error:
            raise
        raise found from error


def _is_in(folder: Path | None, filename: str | bytes | int) -> bool:
    """Tell whether a file is this one, or in this folder."""
    return folder is not None and isinstance(filename, str) and Path(filename).is_relative_to(folder)


def explain(error: BaseException) -> tuple[str, int] | None:
    """Return what a command prints of an error, in one line, and the exit code that it ends with.

    Returns:
        None for a bug: it keeps its traceback.
    """
    known = error if isinstance(error, AppError) else _known(error)
    return None if known is None else (" ".join(str(known).split()), known.exit_code)


def _known(error: BaseException) -> AppError | None:
    text = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else reason(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(str(error))):
        return UsageError(
            f"out of memory ({text}); make batches smaller (batch_size of [train], [precompute] or [evaluate]),"
            " or train with train.gradient_checkpointing = true"
        )
    if fault := disk_fault(error):
        return fault
    if isinstance(error, OSError):
        return DataError(str(error))
    if isinstance(error, concurrent.futures.BrokenExecutor):
        return MachineError(f"a worker process died ({text}); was memory short? {_AGAIN}")
    if not isinstance(error, RuntimeError):
        return None
    if _WORKER.search(str(error)):
        return MachineError(f"a loader's process died ({text}); is memory or /dev/shm too small? {_AGAIN}")
    if _GPU.search(str(error)):
        return MachineError(f"the GPU failed ({text}); {_AGAIN}, on another GPU if it comes again")
    if type(error).__module__.startswith("torch.distributed") or _PEER.search(str(error)):
        return MachineError(f"another process of the run, or the way to it, was lost ({text}); {_AGAIN}")
    return None


_AGAIN = "what was committed is kept: run again"


@contextmanager
def ending_with_its_pipe() -> Iterator[None]:
    """Exit quietly with 141 where nobody reads what this program prints any more, as after `| head`.

    Raises:
        MachineError: it was another pipe that broke.
    """
    try:
        yield
    except BrokenPipeError as error:
        closed = _closed_outputs()
        if not closed:
            raise_disk_fault(error)
        for descriptor in closed:  # Python's last flush must say nothing of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        raise SystemExit(PIPE_CLOSED) from None


def _closed_outputs() -> list[int]:
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]


def leave(code: int) -> NoReturn:
    """Exit; past a process group that has lost a member, whose destructor would abort the process with 134."""
    distributed = sys.modules.get("torch.distributed")
    if (
        code == MachineError.exit_code
        and distributed
        and distributed.is_available()
        and distributed.is_initialized()
    ):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
