"""What this machine has: shared memory, pinned threads, a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from both_stages.doctor.finding import Finding, warning, well
from common.config import Config
from common.errors import MachineError, UsageError
from common.machine import resolve_device

SHARED_MEMORY = Path("/dev/shm")
_ENOUGH_SHARED = 1 << 30
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")


def check_shared_memory(folder: Path = SHARED_MEMORY, enough: int = _ENOUGH_SHARED) -> Iterator[Finding]:
    """Tell how much shared memory there is; only NCCL between several GPUs of a node asks for it."""
    needs = "one process needs none; NCCL between several GPUs does"
    if not folder.is_dir():
        yield warning("shared memory", f"{folder}: there is none; {needs}")
        return
    system = os.statvfs(folder)
    free = system.f_bavail * system.f_frsize
    said = f"{folder}: {free / 1e6:,.0f} MB free; {needs}"
    if free < enough:
        yield warning("shared memory", f"{said}: raise it there, e.g. docker run --shm-size 1g")
    else:
        yield well("shared memory", said)


def check_threads() -> Iterator[Finding]:
    """Tell whether the number of threads, which decides the last bits of records, is pinned."""
    pinned = os.environ.get("OMP_NUM_THREADS", "")
    if pinned:
        yield well("threads", f"OMP_NUM_THREADS={pinned}")
        return
    yield warning(
        "threads",
        f"OMP_NUM_THREADS is not set, so this machine computes in {os.cpu_count()} threads; on machines with other"
        " numbers of cores the last bits of records differ: set it (submit does)",
    )


def check_gpu(config: Config) -> Iterator[Finding]:
    """Compute something where the networks will run, in their arithmetic."""
    import torch

    device = resolve_device(config.model.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f'model.device: received "{config.model.device}", but torch {torch.__version__} finds no GPU; ask the'
            " job system for one, install a torch that fits the driver, or set model.device to auto or cpu"
        )
    if device.type == "cpu":
        driver = next((each for each in _DRIVERS if Path(each).exists()), None)
        if driver is not None and config.model.device == "auto":
            raise MachineError(
                f"{driver} is there, and torch {torch.__version__} finds no GPU; install a torch for the driver"
            )
        yield warning(
            "GPU", "none is asked for" if config.model.device == "cpu" else "there is none: all runs on the CPU"
        )
        return
    dtype = getattr(torch, config.model.dtype)
    ones = torch.ones(256, 256, device=device, dtype=dtype)
    if (ones @ ones)[0, 0].item() != 256:
        raise MachineError(
            f"{device}: 256 ones add up to {(ones @ ones)[0, 0].item()}; take this GPU out of service"
        )
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    yield well("GPU", f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, computes in {config.model.dtype}")
