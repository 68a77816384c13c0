"""How networks are run: compiled, in another memory order, by algorithms that give the same bits every time.

What is compiled is kept in a folder for later processes: a job that goes on, or the next task of an array, then
compiles nothing and only loads. $TORCHINDUCTOR_CACHE_DIR places the folder, as PyTorch has it; without it, it is
$XDG_CACHE_HOME (or ~/.cache) / anytext2-distill / inductor, where PyTorch's own default, under /tmp, is lost with
the machine. Files are named by a hash of the code, the shapes, PyTorch's version and the GPU: many processes may
share the folder, and nothing stale is taken.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import MachineError, reason
from common.faults import raise_disk_fault
from common.sections import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

CACHE_DIR_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
SHAPES = 64
"""Shapes that one network is compiled for; any further ones run as they are. A caption's chunks, a mask for them,
gradients and the batch size make a shape each."""


def default_cache_dir() -> Path:
    """Return $TORCHINDUCTOR_CACHE_DIR, else $XDG_CACHE_HOME (or ~/.cache) / anytext2-distill / inductor."""
    if os.environ.get(CACHE_DIR_VARIABLE):
        return Path(os.environ[CACHE_DIR_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anytext2-distill" / "inductor"


def prepare_networks(model: ModelConfig, *networks: nn.Module) -> None:
    """Give networks the memory order and the compilation that [model] asks for, in place.

    Names of modules and keys of state dicts stay. A network is compiled whole, by TorchInductor, when it is first
    called with a shape. Call this last: after adapters were put in, and before a launcher wraps the network.

    Args:
        model: its keys `compile` and `channels_last`.
        *networks: on their device.

    Raises:
        MachineError: this machine cannot compile.
    """
    if model.channels_last:
        for network in networks:
            set_channels_last(network)
    if model.compile:
        for network in networks:
            compile_network(network)


def set_channels_last(network: nn.Module) -> None:
    """Keep a network's convolution weights as (out, H, W, in) in memory; shapes and values stay."""
    import torch

    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compile_network(network: nn.Module, backend: str = "inductor") -> None:
    """Compile a network in place, when it is first called with a shape.

    Args:
        network: on its device.
        backend: of torch.compile.

    Raises:
        MachineError: this machine cannot compile.
    """
    import torch

    if backend == "inductor":
        _use_cache()
        require_compiler(next(network.parameters()).device)
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, SHAPES)
    dynamo.optimize_ddp = False  # one graph, as in one process: adapters' gradients are small
    network.compile(backend=backend, dynamic=False)


@contextmanager
def as_it_is() -> Iterator[None]:
    """Run compiled networks uncompiled: for rare shapes, and what is called too seldom to be compiled for."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


def make_deterministic() -> None:
    """Have PyTorch choose algorithms that give the same bits in every run, for the rest of this process.

    Call it before CUDA starts and before anything is compiled: both read their settings once.
    """
    import torch
    from torch.utils import deterministic

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one of the two that cuBLAS promises this for
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # else it chooses the fastest kernel by timing
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads it


def _use_cache() -> None:
    """Point PyTorch at the folder; it reads the variable whenever it looks for it."""
    folder = default_cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise_disk_fault(error, f"model.compile: {folder} (${CACHE_DIR_VARIABLE} places it)")
        raise MachineError(
            f"model.compile: {folder} is no folder ({reason(error)}); set ${CACHE_DIR_VARIABLE} to one"
        ) from None
    os.environ[CACHE_DIR_VARIABLE] = str(folder)


@functools.cache
def require_compiler(device: torch.device) -> None:
    """Compile one addition for a device, which takes seconds the first time.

    Raises:
        MachineError: that failed, as without a C++ compiler, Python's headers, or Triton for a GPU.
    """
    import torch

    before = time.perf_counter()
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(1, device=device))
    except Exception as error:  # the compiler's own types, which differ by version and by what is missing
        needs = "g++ and Python's headers" + (", and the package triton" if device.type == "cuda" else "")
        raise MachineError(
            f"model.compile: this machine cannot compile for {device} ({reason(error)}); install {needs}"
            " (Debian: apt install g++ python3-dev), or set model.compile = false"
        ) from error
    kept = os.environ.get(CACHE_DIR_VARIABLE, "")
    logger.debug("compiled for %s in %.1f s; kept in %s", device, time.perf_counter() - before, kept)
