"""What training needs to know of a set of shards, and whether the configured objective can be trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.config import TrainConfig
from common.errors import DataError, UsageError
from common.schedule import make_alphas_cumprod, trailing_timesteps
from shards.reading.reader import ShardSet
from shards.records.members import JSON, ROLLOUT
from shards.records.meta import SampleMeta
from stage2_student.training.objectives import trains_at_starts
from stage2_student.training.phases import Phases, require_distance

PREDICTION_OBJECTIVES = ("lcm", "x0")
"""They read the teacher's recorded one-step predictions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFacts:
    """Facts that hold for every record of a set."""

    base_fingerprint: str
    """Of the base that the teacher was built on."""
    source: str
    """"rollout" or "noised"."""
    record_every: int
    """Solver steps between stored states (of a rollout)."""
    timesteps: tuple[int, ...]
    """t of the stored called states; of the first record if they are noised data."""
    num_rollouts: int
    """R."""
    has_predictions: bool
    """Whether x0_cond and x0_uncond are stored."""


def read_facts(shards: ShardSet) -> ShardFacts:
    """Read the facts from the manifest and the first record.

    Raises:
        DataError: the manifest lacks what it should say, or the first record is damaged.
    """
    identity = shards.manifest.identity
    precompute: dict[str, Any] = identity.get("config", {}).get("precompute", {})
    if "base_fingerprint" not in identity or "record_every" not in precompute:
        raise DataError(
            "the set's manifest does not say base_fingerprint and config.precompute.record_every; was it made by"
            " another program? Precompute the shards again"
        )
    schedule = identity.get("alphas_cumprod")
    if schedule is not None and schedule != make_alphas_cumprod().tolist():
        raise DataError("the set was recorded on another noise schedule than SD1.5's, which training assumes")
    arrays = shards.arrays(0, (ROLLOUT,))
    meta = SampleMeta.from_json(shards.read_members(0, (JSON,))[JSON], f"sample {shards.key(0)}")
    return ShardFacts(
        base_fingerprint=str(identity["base_fingerprint"]),
        source=meta.source,
        record_every=int(precompute["record_every"]),
        timesteps=tuple(int(t) for t in arrays["rollout_timesteps"]),
        num_rollouts=int(arrays["rollout_latents"].shape[0]),
        has_predictions=shards.has_predictions,
    )


def plan_phases(train: TrainConfig, facts: ShardFacts) -> tuple[Phases, Tensor]:
    """Check that the objective can be trained on the set, and cut its solves into phases.

    Returns:
        The phases, and t at which the student will be called in sampling, (M,) int64.

    Raises:
        UsageError: objective, number of phases and shards do not fit each other.
    """
    wanted = "noised" if train.objective == "lcm" else "rollout"
    if facts.source != wanted:
        raise UsageError(
            f'train.objective "{train.objective}" trains on shards of source "{wanted}", received'
            f' "{facts.source}"; precompute with precompute.source = "{wanted}", or choose another objective'
        )
    if train.objective in PREDICTION_OBJECTIVES and not facts.has_predictions:
        raise UsageError(
            f'train.objective "{train.objective}" needs the teacher\'s one-step predictions, which these shards do'
            " not hold; precompute with precompute.store_predictions = true"
        )
    if train.objective == "lcm":
        return Phases(num_states=len(facts.timesteps), num_phases=1), trailing_timesteps(train.num_phases)
    phases = Phases(num_states=len(facts.timesteps), num_phases=train.num_phases)
    if train.objective in ("phased", "pcm"):
        require_distance(facts.record_every * (phases.states_per_phase if trains_at_starts(train) else 1))
    return phases, phases.student_timesteps(torch.tensor(facts.timesteps))


def require_base(facts: ShardFacts, base_fingerprint: str, where: object) -> None:
    """Refuse shards of another base than the one that is to be adapted.

    Raises:
        DataError: the fingerprints differ.
    """
    if facts.base_fingerprint != base_fingerprint:
        raise DataError(
            f"{where}: the shards were recorded on the base {facts.base_fingerprint[:12]}, model.checkpoint is"
            f" the base {base_fingerprint[:12]}; give the checkpoint that precompute ran on, or precompute again"
        )
