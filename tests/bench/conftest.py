"""A place for benchmarks, with everything as small as it gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

from bench.gpu.place import SMALL, Place, prepare_place


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """Each test chooses its own precision."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("bench"), SMALL)
    prepare_place(place)
    return place
