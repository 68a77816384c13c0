"""Removing what dead tasks left in a set, while others may work on it."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from shards.files.locks import remove_leftovers, shorten, unsure
from shards.files.manifest import read_manifest
from shards.files.names import WORK_DIR
from shards.files.tasks import Watch

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


def clean(folder: Path, watch: Watch | None = None) -> list[str]:
    """Remove the temporary files, claims and notes of tasks that are dead for certain.

    What may be a dead task's is watched until it moves, or did not for as long as `Watch` asks.

    Args:
        folder: the set's.
        watch: of its tasks; a fresh one if None.

    Returns:
        The names of what was removed.

    Raises:
        DataError: there is no set.
    """
    if not (folder / WORK_DIR).is_dir():
        read_manifest(folder)
    watch = watch or Watch(folder)
    removed = remove_leftovers(folder, watch)
    told = False
    while doubtful := unsure(folder, watch):
        if not told:
            logger.info("watching for up to %.0f s whether these live: %s", watch.seconds, shorten(doubtful))
            told = True
        time.sleep(_LOOK_SECONDS)
    return removed + remove_leftovers(folder, watch)
