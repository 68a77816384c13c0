"""Whole rollouts of a held-out set, for evaluation: any state of any sample in one read.

A zarr v3 array `states` [sample, step, C, h, w]: a chunk is one state with its own crc32c, a zarr shard (one file)
is a block of samples, written at once by one task. The array is made whole beforehand; a record of its own, made
after the block's file is on disk, says that a block was written, so that missing never looks like zeros.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.differences import require_same
from common.errors import DataError
from common.faults import naming, raise_disk_fault
from common.files import canonical_json, fsync_dir, read_bytes, sha256_file, write_bytes_atomic

if TYPE_CHECKING:
    import torch

_ABOUT = "about.json"
_DONE = "done"
_STATES = "states"


class TrajectoryStore:
    """A folder with the states of every sample of a held-out set at every solver step."""

    def __init__(self, folder: Path) -> None:
        """Open one.

        Raises:
            DataError: there is none, or its description is damaged.
        """
        self.folder = folder
        path = folder / _ABOUT
        try:
            self._about: dict[str, Any] = json.loads(read_bytes(path))
            self.input_ids: tuple[str, ...] = tuple(self._about["input_ids"])
            self.timesteps: tuple[int, ...] = tuple(self._about["timesteps"])
            self._block, self._shape = int(self._about["block"]), tuple(self._about["latent_shape"])
        except FileNotFoundError:
            raise DataError(f"{folder}: no trajectories; write them with precompute --trajectories") from None
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: damaged; restore it from a copy or write the trajectories anew") from None
        self._done: dict[int, frozenset[int]] = {}  # of blocks known to be written: their failed samples

    @staticmethod
    def create_or_open(
        folder: Path,
        *,
        identity: Mapping[str, Any],
        input_ids: Sequence[str],
        timesteps: Sequence[int],
        latent_shape: tuple[int, int, int],
        block: int,
    ) -> TrajectoryStore:
        """Join a store: make it whole and empty, or check that this task would write the same. Tasks may race.

        Args:
            folder: where; made at once by a rename.
            identity: what decides the solves (the shards' identity), JSON values.
            input_ids: of the samples, in order.
            timesteps: of the N called states; state N is the solved x0.
            latent_shape: (C, h, w).
            block: samples in one file, which one task writes at once.

        Raises:
            DataError: the store was made with other settings; the message names them.
        """
        about = json.loads(
            canonical_json(
                {
                    "identity": identity,
                    "input_ids": list(input_ids),
                    "timesteps": list(timesteps),
                    "latent_shape": list(latent_shape),
                    "block": block,
                }
            )
        )
        if not folder.exists():
            _make_whole(folder, about)
        store = TrajectoryStore(folder)
        require_same(about, store._about, f"{folder}: made with other settings", "use another folder")
        return store

    @property
    def identity(self) -> dict[str, Any]:
        """What decided the solves: that of the set whose rollouts these are."""
        return dict(self._about["identity"])

    @property
    def rollout_shape(self) -> tuple[int, ...]:
        """Of one sample, (N + 1, C, h, w)."""
        return (len(self.timesteps) + 1, *self._shape)

    @property
    def num_blocks(self) -> int:
        """Files that hold the samples; the last block may be short."""
        return -(-len(self.input_ids) // self._block)

    def block_samples(self, block: int) -> range:
        """Return which samples a block holds."""
        return range(block * self._block, min((block + 1) * self._block, len(self.input_ids)))

    def is_done(self, block: int) -> bool:
        """Tell whether a block's completion record is there and its file is the one recorded."""
        path = self._block_path(block)
        try:
            record = json.loads(read_bytes(self._record_path(block)))
            return bool(record["sha256"] == (sha256_file(path) if record["sha256"] else None))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def missing(self) -> list[int]:
        """Return the blocks that are yet to be written, or damaged."""
        return [block for block in range(self.num_blocks) if not self.is_done(block)]

    def write_block(self, block: int, states: torch.Tensor, *, failed: Sequence[int] = ()) -> None:
        """Write all samples of a block at once, then its completion record.

        Args:
            block: which one.
            states: (samples, N + 1, C, h, w), stored as float16.
            failed: rows of `states` that have no rollout, because their input failed; their values are not read.

        Raises:
            DataError: the shape is another, or a value is NaN or infinite.
            OSError: the disk refused.
        """
        samples = self.block_samples(block)
        values = states.detach().half().cpu().numpy()
        expected = (len(samples), *self.rollout_shape)
        if values.shape != expected:
            raise DataError(f"{self.folder}, block {block}: states have shape {values.shape}, expected {expected}")
        solved = np.setdiff1d(np.arange(len(values)), np.asarray(failed, np.int64))
        if not np.isfinite(values[solved]).all():
            raise DataError(f"{self.folder}, block {block}: states hold NaN or infinity; check the teacher")
        path = self._block_path(block)
        self._done.pop(block, None)
        self._record_path(block).unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # it may be damaged, and zarr would read it to fill up a short block
        if len(solved):
            values = values.copy()
            values[list(failed)] = np.nan  # the fill value: zarr stores nothing for it
            self._array[samples.start : samples.stop] = values
            with path.open("rb") as file:
                os.fsync(file.fileno())
            fsync_dir(path.parent)
        record = {
            "block": block,
            "failed": [samples.start + row for row in failed],
            "sha256": sha256_file(path) if len(solved) else None,
        }
        write_bytes_atomic(self._record_path(block), canonical_json(record))

    def read(self, sample: int, step: int) -> torch.Tensor:
        """Read one state.

        Args:
            sample: its place in `input_ids`.
            step: 0 is the noise, N the solved x0.

        Returns:
            (C, h, w) float16.

        Raises:
            DataError: the block was not written, its input failed, or the state is damaged.
        """
        return self._read(sample, slice(step, step + 1) if step >= 0 else slice(step, None))[0]

    def read_rollout(self, sample: int) -> torch.Tensor:
        """Read all states of a sample, (N + 1, C, h, w) float16; see `read`."""
        return self._read(sample, slice(None))

    def _read(self, sample: int, steps: slice) -> torch.Tensor:
        import torch

        if not 0 <= sample < len(self.input_ids):
            raise IndexError(f"sample {sample} of {len(self.input_ids)}")
        block = sample // self._block
        where = f"{self.folder}, sample {sample} ({self.input_ids[sample]})"
        if block not in self._done:
            self._done[block] = self._read_failed(block, where)
        if sample in self._done[block]:
            raise DataError(f"{where}: this input failed and has no rollout; the set's failures/ says why")
        try:
            values = np.asarray(self._array[sample, steps])
        except Exception as error:  # zarr raises what its codecs and its store raise
            raise_disk_fault(error, where)
            raise DataError(f"{where}: damaged ({error}); run precompute --trajectories again") from None
        if not np.isfinite(values).all() or not len(values):
            raise DataError(f"{where}: the state is missing from its file; run precompute --trajectories again")
        return torch.from_numpy(values.copy())

    def _read_failed(self, block: int, where: str) -> frozenset[int]:
        try:
            return frozenset(json.loads(read_bytes(self._record_path(block)))["failed"])
        except FileNotFoundError:
            what = "was never written"
        except (ValueError, KeyError, TypeError):
            what = "has a damaged completion record"
        raise DataError(f"{where}: its block {block} {what}; run precompute --trajectories again")

    @cached_property
    def _array(self) -> Any:
        import zarr

        return zarr.open_array(str(self.folder / _STATES), mode="r+")

    def _record_path(self, block: int) -> Path:
        return self.folder / _DONE / f"{block:06d}.json"

    def _block_path(self, block: int) -> Path:
        return self.folder / _STATES / "c" / f"{block}" / "0" / "0" / "0" / "0"


def _make_whole(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder under a temporary name and rename it; another task may be first."""
    import zarr
    from zarr.codecs import Crc32cCodec

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        with naming(folder, temporary=temporary):
            shape = tuple(about["latent_shape"])
            steps = len(about["timesteps"]) + 1
            zarr.create_array(
                str(temporary / _STATES),
                shape=(len(about["input_ids"]), steps, *shape),
                chunks=(1, 1, *shape),
                shards=(about["block"], steps, *shape),
                dtype="float16",
                fill_value=float("nan"),
                compressors=[Crc32cCodec()],
                dimension_names=["sample", "step", "channel", "height", "width"],
            )
            (temporary / _DONE).mkdir()
            write_bytes_atomic(temporary / _ABOUT, canonical_json(about))
            temporary.chmod(0o755)
            try:
                temporary.rename(folder)
            except OSError:
                if not (folder / _ABOUT).exists():
                    raise
            fsync_dir(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
