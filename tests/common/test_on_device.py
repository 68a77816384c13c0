from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from common.on_device import own_stream, send_to_host, used_here
from common.overlap import Behind
from common.tensors import Tensors

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair(Tensors):
    values: Tensor
    indices: Tensor | None = None


def test_on_the_cpu_nothing_is_copied_or_awaited() -> None:
    pair = Pair(values=torch.ones(3))
    with own_stream(torch.device("cpu"))():
        sent = send_to_host(used_here(pair), torch.device("cpu"))
    assert sent.get().values.data_ptr() == pair.values.data_ptr()
    assert sent.get().indices is None


@needs_gpu
def test_copies_from_a_gpu_arrive_whole_and_what_was_on_the_cpu_stays() -> None:
    device = torch.device("cuda")
    values, indices = torch.arange(10**7, device=device), torch.arange(3)
    torch.cuda._sleep(10**8)  # the copy waits behind it, and `get` for the copy
    sent = send_to_host(Pair(values=values + 1, indices=indices), device)
    arrived = sent.get()
    assert arrived.values.equal(torch.arange(1, 10**7 + 1)) and arrived.values.is_pinned()
    assert arrived.indices is not None and arrived.indices.data_ptr() == indices.data_ptr()


@needs_gpu
def test_work_on_a_stream_of_its_own_is_finished_when_its_context_is_left() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    main = torch.cuda.current_stream(device)
    seen: list[torch.cuda.Stream] = []

    def work() -> Pair:
        assert threading.current_thread() is not threading.main_thread()
        seen.append(torch.cuda.current_stream())
        torch.cuda._sleep(10**8)
        return Pair(values=torch.full((10**6,), 7, device=device))

    with Behind("work", threaded=True, within=own_stream(device)) as behind:
        results = [used_here(behind.do(work).result()).values for _ in range(3)]
        sums = [int(values.sum()) for values in results]
    assert sums == [7 * 10**6] * 3
    assert all(stream != main for stream in seen) and len(set(seen)) == 1
