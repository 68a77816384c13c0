from __future__ import annotations

import copy
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config

from common.compiling import (
    as_it_is,
    compile_network,
    default_cache_dir,
    make_deterministic,
    prepare_networks,
    require_compiler,
)
from common.errors import MachineError
from common.sections import ModelConfig

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.silu(self.first(x)))


@pytest.fixture(autouse=True)
def forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before counts, and what is compiled here lies in a folder of this test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(
        torch._inductor.config.cpp, "vec_isa_ok", True, raising=False
    )  # else seconds go into trying out the CPU
    require_compiler.cache_clear()
    torch._dynamo.reset()
    yield
    require_compiler.cache_clear()
    torch._dynamo.reset()


def counted() -> dict[str, Counter[str]]:
    from torch._dynamo.utils import counters

    counters.clear()
    return counters


def loss_and_gradients(network: nn.Module, x: Tensor) -> list[Tensor]:
    network.zero_grad()
    loss = network(x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


@needs_compiler
def test_a_compiled_network_computes_the_same_under_the_same_names_and_is_compiled_once_for_all_processes(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    plain, x = Small(), torch.randn(2, 3, 8, 8)
    network = copy.deepcopy(plain)
    prepare_networks(ModelConfig(compile=True), network)
    counters = counted()
    torch.testing.assert_close(loss_and_gradients(network, x), loss_and_gradients(plain, x))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert counters["inductor"]["fxgraph_cache_miss"] == 2  # forward and backward
    assert list(network.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in network.named_modules()] == [name for name, _ in plain.named_modules()]
    assert (tmp_path / "cache/fxgraph").is_dir()

    torch._dynamo.reset()  # forgets as a new process does
    counters = counted()
    loss_and_gradients(network, x)
    assert counters["inductor"]["fxgraph_cache_hit"] == 2 and not counters["inductor"]["fxgraph_cache_miss"]


def test_each_shape_is_compiled_for_and_what_runs_as_it_is_is_not() -> None:
    network = Small()
    compile_network(network, backend="aot_eager")
    counters = counted()
    for rows in (2, 3, 2):
        network(torch.randn(rows, 3, 8, 8))
    assert counters["stats"]["unique_graphs"] == 2
    with as_it_is():
        network(torch.randn(5, 3, 8, 8))
    assert counters["stats"]["unique_graphs"] == 2


def test_another_memory_order_changes_strides_alone() -> None:
    torch.manual_seed(0)
    plain, x = Small(), torch.randn(2, 3, 8, 8)
    network = copy.deepcopy(plain)
    prepare_networks(ModelConfig(channels_last=True), network)
    assert network.first.weight.stride() != plain.first.weight.stride()
    assert network.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), plain.parameters(), strict=True))
    torch.testing.assert_close(loss_and_gradients(network, x), loss_and_gradients(plain, x))


def test_a_machine_without_a_compiler_is_told_what_to_install(tmp_path: Path) -> None:
    expected = pytest.raises(MachineError, match=r"model\.compile: .* cannot compile for cpu .*apt install g\+\+")
    with config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}), expected:
        prepare_networks(ModelConfig(compile=True), Small())


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/cache"))
    with pytest.raises(MachineError, match=r"file/cache is no folder .*; set \$TORCHINDUCTOR_CACHE_DIR"):
        prepare_networks(ModelConfig(compile=True), Small())


def test_the_cache_lies_where_later_jobs_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home/anytext2-distill/inductor"


def test_determinism_is_asked_for_before_cuda_reads_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import deterministic

    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
        monkeypatch.setenv(name, "unset")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    make_deterministic()
    try:
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1"
        with pytest.raises(RuntimeError, match="deterministic"):  # of what has no such algorithm
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    finally:
        torch.use_deterministic_algorithms(False)
