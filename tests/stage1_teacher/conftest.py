"""What every test of stage one runs under."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Sums in one order, however many cores there are."""
    torch.set_num_threads(1)
