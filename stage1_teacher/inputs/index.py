"""The index of a set's input files: the first task reads a file whole, all others only the entries that they need.

It lies beside the set, one table for each file and way of reading it, valid while the file's size and modification
time stay what they were. An entry that is read is checked against its id all the same (`annotations`, `prompts`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.faults import naming
from common.files import canonical_json
from shards.files.names import INDEX_DIR
from shards.files.tasks import Task
from stage1_teacher.inputs.table import Place, StoredTable, Table, store

logger = logging.getLogger(__name__)


class InputIndex:
    """Tables of input files in a set's folder."""

    def __init__(self, folder: Path, task: Task) -> None:
        """Look into a set's folder.

        Args:
            folder: the set's.
            task: that asks; one of many makes a table, the others wait for it.
        """
        self._folder, self._task = folder / INDEX_DIR, task
        self._folder.mkdir(parents=True, exist_ok=True)

    def table(self, path: Path, settings: dict[str, Any], limit: int | None, scan: Callable[[], Table]) -> Place:
        """Return the table of a file; it is read whole if no task did so before.

        Args:
            path: of the file.
            settings: that decide ids, or which inputs there are.
            limit: inputs after which reading stops; None reads all.
            scan: reads the file.

        Raises:
            DataError: as `scan`.
        """
        with naming(path):
            about = path.stat()
        key = {"file": str(path.resolve()), "size": about.st_size, "mtime_ns": about.st_mtime_ns, **settings}
        whole = self._path(key)
        wanted = whole if limit is None else self._path({**key, "limit": limit})
        found = _open(whole) or (None if wanted == whole else _open(wanted))
        if found is not None:
            return found
        with self._task.claimed(wanted.name, lambda: whole.exists() or wanted.exists()) as is_mine:
            if is_mine:
                table = scan()
                store(table, whole if table.complete else wanted, key)
        found = _open(whole) or _open(wanted)
        if found is None:
            raise DataError(f"{wanted}: the index of {path} was removed while it was in use; run again")
        return found

    def _path(self, key: dict[str, Any]) -> Path:
        return self._folder / f"{hashlib.sha256(canonical_json(key)).hexdigest()[:24]}.table"


def _open(path: Path) -> StoredTable | None:
    try:
        return StoredTable(path)
    except FileNotFoundError:
        return None
    except DataError as error:
        logger.warning("%s", error)
        path.unlink(missing_ok=True)
        return None
