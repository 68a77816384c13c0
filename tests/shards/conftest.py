from __future__ import annotations

from pathlib import Path

import pytest

from shards.reading.reader import ShardSet
from tests.shards.builders import write_set


@pytest.fixture(scope="session")
def shared_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 30 samples in shards of 4, with predictions; do not change it."""
    folder = tmp_path_factory.mktemp("shared") / "set"
    write_set(folder, 30, predictions=True)
    return folder


@pytest.fixture
def shards(shared_set: Path) -> ShardSet:
    return ShardSet.open(shared_set)
