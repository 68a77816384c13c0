"""Extending a plan by millions of inputs: prepared as a file, then given its name, without a list of all ids."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.faults import naming
from common.files import canonical_json, fsync_dir, link_new, open_temporary
from shards.files.names import PLAN_DIR, SCHEMA
from shards.files.plan import Plan, read_plan, segment_path

Digests = np.ndarray[Any, np.dtype[np.uint8]]
_CHUNK_ROWS = 1 << 16


class PlanExtension:
    """Inputs that a plan does not have yet, ready to become its next segment; a context manager."""

    def __init__(
        self,
        folder: Path,
        digests: Digests,
        samples_per_shard: int,
        find_first: Callable[[Digests], np.ndarray[Any, np.dtype[np.bool_]]],
    ) -> None:
        """Find out what is new, and write it down under a temporary name.

        Args:
            folder: the set's.
            digests: ids of all inputs of this run, in order, (inputs, 16) bytes.
            samples_per_shard: of new shards.
            find_first: tells which rows of ids are the first with theirs.

        Raises:
            DataError: the plan is damaged.
        """
        (folder / PLAN_DIR).mkdir(parents=True, exist_ok=True)
        plan = read_plan(folder)
        self._path = segment_path(folder, len(plan.segments))
        self._temporary: Path | None = None
        self._file: IO[bytes] | None = None
        known = _known(plan)
        new = digests[find_first(np.concatenate([known, digests]))[len(known) :]]
        if len(new):
            self._temporary, self._file = open_temporary(self._path)  # nobody takes it for a dead task's
            with naming(self._path, temporary=self._temporary):
                _write(self._file, new, plan, samples_per_shard)

    def __enter__(self) -> PlanExtension:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)

    def publish(self) -> bool:
        """Extend the plan.

        Returns:
            False if another task extended it meanwhile: then look again at what is new.
        """
        if self._temporary is None:
            return True
        done = link_new(self._temporary, self._path)
        fsync_dir(self._path.parent)
        return done


def _known(plan: Plan) -> Digests:
    """Return the plan's ids; one that is no hash of ours is equal to none of them and left out."""
    found = [np.zeros((0, 16), np.uint8)]
    for segment in plan.segments:
        for start in range(0, len(segment.input_ids), _CHUNK_ROWS):
            ids = segment.input_ids[start : start + _CHUNK_ROWS]
            data = bytes.fromhex("".join(i for i in ids if len(i) == 32 and _is_hex(i)))
            found.append(np.frombuffer(data, np.uint8).reshape(-1, 16))
    return np.concatenate(found)


def _is_hex(text: str) -> bool:
    return not text.strip("0123456789abcdef")


def _write(file: IO[bytes], new: Digests, plan: Plan, samples_per_shard: int) -> None:
    header = {
        "schema": SCHEMA,
        "first_shard": plan.num_shards,
        "first_index": plan.num_inputs,
        "samples_per_shard": samples_per_shard,
        "count": len(new),
    }
    digest = hashlib.sha256(canonical_json(header))
    for lines in _lines(new):
        digest.update(lines)
    file.write(canonical_json({**header, "sha256": digest.hexdigest()}))
    file.writelines(_lines(new))
    file.flush()
    os.fsync(file.fileno())


def _lines(new: Digests) -> Iterator[bytes]:
    for start in range(0, len(new), _CHUNK_ROWS):
        yield new[start : start + _CHUNK_ROWS].tobytes().hex("\n", -16).encode() + b"\n"
