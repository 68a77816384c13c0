"""The loss on records that are not trained on: the same draws every time, and no trace in what is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from common.errors import UsageError
from common.sections import TrainConfig
from shards.reading.loader import TRAINING_MEMBERS
from shards.reading.reader import ShardSet
from shards.records.batch import Batch, collate_arrays
from shards.records.members import PREDICTIONS
from stage2_student.student.shard_facts import read_facts, require_base
from stage2_student.training.ema import Ema
from stage2_student.training.phases import PREDICTION_OBJECTIVES, plan_phases
from stage2_student.training.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """The first records of a set, and when their loss is measured."""

    shards: ShardSet
    """The set."""
    count: int
    """Records of it that are used."""
    num_rollouts: int
    """Solves of a record as the draws assume; records with fewer repeat theirs."""
    train: TrainConfig
    """Says how often, the batch size, and what is read."""

    @staticmethod
    def open(location: str | Path, plan: Plan) -> HeldOut:
        """Open a held-out set and check that its loss is the run's own.

        Args:
            location: folder or URL of the set.
            plan: of the run.

        Raises:
            UsageError: it is the set that is trained on, or was recorded otherwise.
            DataError: it cannot be read, or is of another base.
        """
        shards = ShardSet.open(location, allow_incomplete=True)
        if shards.set_hash == plan.shards.set_hash:
            raise UsageError(f"--held-out {location}: is the set that is trained on; give one of other inputs")
        facts, train = read_facts(shards), plan.config.train
        require_base(facts, str(plan.identity["base_fingerprint"]), f"--held-out {location}")
        if facts.source != plan.facts.source:
            raise UsageError(
                f'--held-out {location}: its records are of source "{facts.source}", expected'
                f' "{plan.facts.source}" as those that are trained on; precompute it as these'
            )
        phases, timesteps = plan_phases(train, facts)
        if phases != plan.phases or tuple(timesteps.tolist()) != plan.card.timesteps:
            raise UsageError(
                f"--held-out {location}: its solves were recorded at t = {list(facts.timesteps)}, expected those"
                f" of the shards that are trained on, {list(plan.facts.timesteps)}; precompute it as them"
            )
        count = min(train.held_out_samples, len(shards))
        return HeldOut(shards=shards, count=count, num_rollouts=plan.facts.num_rollouts, train=train)

    def is_due(self, step: int) -> bool:
        """Tell whether the loss is measured after so many optimizer steps."""
        return step % self.train.held_out_every == 0 or step == self.train.max_steps

    def batches(self, rank: int, world: int) -> Iterator[Batch]:
        """Yield one rank's part of the records, each at the draws of epoch 0."""
        members: tuple[str, ...] = TRAINING_MEMBERS
        if self.train.objective in PREDICTION_OBJECTIVES:
            members = (*members, PREDICTIONS)
        own = range(rank, self.count, world)
        for start in range(0, len(own), self.train.batch_size):
            indices = own[start : start + self.train.batch_size]
            rows = [self.shards.arrays(index, members) for index in indices]
            yield self._repeat_rollouts(collate_arrays(rows, indices, [0] * len(indices)))

    def _repeat_rollouts(self, batch: Batch) -> Batch:
        found = batch.rollout_latents.shape[1]
        if found >= self.num_rollouts:
            return batch
        which = torch.arange(self.num_rollouts) % found

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[:, which]

        return replace(
            batch,
            rollout_latents=batch.rollout_latents[:, which],
            x0_cond=pick(batch.x0_cond),
            x0_uncond=pick(batch.x0_uncond),
        )

    @torch.no_grad()
    def measure(
        self, losses: Callable[[Batch], Tensor], ema: Ema | None, accelerator: Accelerator
    ) -> dict[str, float]:
        """Return the mean loss of the records, over all ranks.

        Args:
            losses: of each sample of a batch, by the weights as they are.
            ema: the weights' average, if the run keeps one: its loss is measured too.
            accelerator: of this launch; every rank calls this.

        Returns:
            "held_out_loss", and "held_out_loss_ema" of the average; objective `pcm` with the average as its target
            has the former alone.
        """
        found = {"held_out_loss": self._mean(losses, accelerator)}
        if ema is not None and not (self.train.objective == "pcm" and self.train.pcm_target == "ema"):
            with ema.in_place():
                found["held_out_loss_ema"] = self._mean(losses, accelerator)
        return found

    def _mean(self, losses: Callable[[Batch], Tensor], accelerator: Accelerator) -> float:
        total = torch.zeros(2, dtype=torch.float32, device=accelerator.device)  # sum and count; no float64 on MPS
        for batch in self.batches(accelerator.process_index, accelerator.num_processes):
            of_batch = losses(batch)
            total += torch.stack([of_batch.sum().float(), of_batch.new_tensor(len(of_batch)).float()])
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total, reduction="sum")
        return float(total[0] / total[1])
