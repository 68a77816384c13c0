"""RUN/best: the adapter of lowest endpoint error among those measured, replaced in one rename.

It is a link to a finished copy in the folder of the run's watchers. The copy before it stays until the next
change, so that whoever began to read it can end.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from common.errors import DataError
from common.files import canonical_json, fsync_dir, read_bytes, temporary_path, write_bytes_atomic
from stage2_student.watching.checkpoints import Candidate
from stage2_student.watching.log import Measured, rank

logger = logging.getLogger(__name__)

BEST = "best"
"""In a run's folder."""
_PREFIX = "best-"


def require_own(run: Path) -> None:
    """Refuse a RUN/best that is not a watcher's.

    Raises:
        DataError: it is none.
    """
    path = run / BEST
    if path.exists() and not path.is_symlink():
        raise DataError(f"{path}: not made by watch, which would replace it; give it another name")


class BestKeeper:
    """Keeps RUN/best."""

    def __init__(self, run: Path, folder: Path) -> None:
        """Keep the best of a run.

        Args:
            run: the run's folder.
            folder: where watchers of the run keep their files, in `run`.
        """
        self._run, self._folder = run, folder
        self._gone: set[str] = set()

    def keep(self, measured: Sequence[Measured], candidates: Sequence[Candidate]) -> Measured | None:
        """Bring RUN/best up to date; what cannot be copied any more is passed over for the next best, and said.

        Args:
            measured: of all checkpoints.
            candidates: adapters that are there to be copied.

        Returns:
            What RUN/best holds; None if nothing could be copied.
        """
        there = {candidate.identity: candidate for candidate in candidates}
        held = self._held()
        for one in sorted(measured, key=rank):
            name = f"{_PREFIX}{one.step:08d}-{one.adapter[:12]}"
            if name == held:
                return one
            if (self._folder / name).is_dir() or self._copy(there.get(one.adapter), name):
                self._link(name, held)
                return one
            if name not in self._gone:
                self._gone.add(name)
                logger.warning("step %d: its checkpoint is gone, so that it cannot be %s", one.step, BEST)
        return None

    def _held(self) -> str:
        link = self._run / BEST
        name = link.readlink().name if link.is_symlink() else ""
        return name if (self._folder / name).is_dir() else ""

    def _copy(self, candidate: Candidate | None, name: str) -> bool:
        """Copy an adapter, whole and as it was measured; return False if it is gone."""
        if candidate is None:
            return False
        temporary = temporary_path(self._folder / name)
        hashes = {}
        try:
            for path in sorted(candidate.adapter.rglob("*")):
                if path.is_file():
                    inside, data = path.relative_to(candidate.adapter), read_bytes(path)
                    hashes[inside.as_posix()] = hashlib.sha256(data).hexdigest()
                    (temporary / inside).parent.mkdir(parents=True, exist_ok=True)
                    write_bytes_atomic(temporary / inside, data)
            if hashlib.sha256(canonical_json(hashes)).hexdigest() != candidate.identity:
                return False
            temporary.rename(self._folder / name)
            fsync_dir(self._folder)
        except FileNotFoundError:
            return False
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True

    def _link(self, name: str, held: str) -> None:
        link = temporary_path(self._run / BEST)
        link.symlink_to(Path(os.path.relpath(self._folder, self._run)) / name)
        link.replace(self._run / BEST)
        fsync_dir(self._run)
        for path in self._folder.glob(f"{_PREFIX}*"):
            if path.name not in (name, held):
                shutil.rmtree(path, ignore_errors=True)
