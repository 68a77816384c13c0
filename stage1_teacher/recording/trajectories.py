"""Keeping whole rollouts beside the shards: block j of the trajectories holds the inputs of shard j.

Sample i R + r of the store is rollout r of the set's i-th input, R being `precompute.num_rollouts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import DataError, UsageError, reason
from common.faults import blame
from common.schedule import trailing_timesteps
from common.sections import PrecomputeConfig
from shards.files.plan import Plan, PlannedShard
from shards.trajectories import TrajectoryStore


def check_has_rollouts(settings: PrecomputeConfig) -> None:
    """Refuse settings under which nothing is solved.

    Raises:
        UsageError: the source is not "rollout".
    """
    if settings.source != "rollout":
        remedy = "leave --states-from away" if settings.source == "student" else 'set it to "rollout"'
        raise UsageError(
            f'--trajectories keeps solves, precompute.source is "{settings.source}"; {remedy}, or leave'
            " --trajectories away"
        )


class RolloutKeeper:
    """Writes the whole rollouts of a shard once the shard is committed."""

    def __init__(self, store: TrajectoryStore, num_rollouts: int) -> None:
        """Keep in an open store; `open` makes or joins one."""
        self._store, self._num_rollouts = store, num_rollouts

    @staticmethod
    def open(
        folder: Path,
        *,
        identity: dict[str, Any],
        plan: Plan,
        settings: PrecomputeConfig,
        latent_shape: tuple[int, int, int],
    ) -> RolloutKeeper:
        """Make or join the store of a set.

        Args:
            folder: of the trajectories, not the set's.
            identity: the set's.
            plan: all of the set's shards.
            settings: how inputs are solved.
            latent_shape: (C, h, w).

        Raises:
            DataError: the store is another set's, or the set was extended.
        """
        if len(plan.segments) != 1:
            raise DataError(
                f"{folder}: the set was extended {len(plan.segments) - 1} times and trajectories are kept of a "
                "set made at once; use another --out folder with all inputs"
            )
        segment, rollouts = plan.segments[0], settings.num_rollouts
        store = TrajectoryStore.create_or_open(
            folder,
            identity=identity,
            input_ids=[input_id for input_id in segment.input_ids for _ in range(rollouts)],
            timesteps=trailing_timesteps(settings.solver_steps).tolist(),
            latent_shape=latent_shape,
            block=segment.samples_per_shard * rollouts,
        )
        return RolloutKeeper(store, rollouts)

    def is_missing(self, shard_index: int) -> bool:
        """Tell whether a shard's rollouts are yet to be written, or damaged."""
        return not self._store.is_done(shard_index)

    def write(self, shard: PlannedShard, rollouts: Sequence[Tensor], failed: Sequence[int]) -> None:
        """Write a shard's rollouts as its block.

        Args:
            shard: which one.
            rollouts: of its inputs, in order, (B, N + 1, C, h, w) float16 of each batch of solves.
            failed: places within it of inputs that failed and have none.

        Raises:
            MachineError: the disk refused.
        """
        rows = self._num_rollouts
        gone = [place * rows + number for place in failed for number in range(rows)]
        count = len(shard.input_ids) * rows
        states = torch.full((count, *self._store.rollout_shape), float("nan"), dtype=torch.float16)
        if rollouts:
            states[sorted(set(range(count)) - set(gone))] = torch.cat(list(rollouts))
        try:
            self._store.write_block(shard.shard_index, states, failed=gone)
        except OSError as error:
            raise blame(error)(
                f"{self._store.folder}: block {shard.shard_index} cannot be written ({reason(error)}); "
                "committed shards are safe: free space or mend the disk, then run again"
            ) from error
