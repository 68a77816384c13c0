"""What annotation and prompt files share: how one is opened, and what is said of one that changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from common.errors import DataError, reason
from common.faults import raise_disk_fault
from stage1_teacher.inputs.index import InputIndex
from stage1_teacher.inputs.table import Place, Table


def open_file(path: Path) -> IO[bytes]:
    """Open an input file to read its entries.

    Raises:
        DataError: there is none.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise_disk_fault(error, path)
        raise DataError(f"{path}: {reason(error)}") from None


def open_table(
    path: Path,
    settings: dict[str, Any],
    limit: int | None,
    scan: Callable[[int | None], Table],
    index: InputIndex | None,
) -> Place:
    """Return where a file's inputs lie: from an index, or by reading the file.

    Args:
        path: the file.
        settings: that decide ids, or which inputs there are.
        limit: inputs after which reading may stop.
        scan: reads the file, with a limit.
        index: of the set's input files; None reads the file.
    """
    if index is None:
        return scan(limit)
    open_file(path).close()
    return index.table(path, settings, limit, lambda: scan(limit))


def has_changed(path: Path, table: Place) -> DataError:
    """Return what to raise where an entry is not the one that was scanned; the next run reads the file anew."""
    table.forget()
    return DataError(
        f"{path}: the file changed while it was in use, or a font that it names did; an input is another one now:"
        " restore the file, or run again to take it as it is"
    )
