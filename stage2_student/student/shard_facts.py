"""What a student needs to know of the set of shards that it is trained on or compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.errors import DataError
from common.schedule import make_alphas_cumprod
from shards.reading.reader import ShardSet
from shards.records.members import JSON, ROLLOUT
from shards.records.meta import SampleMeta


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFacts:
    """Facts that hold for every record of a set."""

    base_fingerprint: str
    """Of the base that the teacher was built on."""
    source: str
    """"rollout", "noised" or "student"."""
    record_every: int
    """Solver steps between stored states (of a rollout)."""
    timesteps: tuple[int, ...]
    """t of the stored called states; of the first record if they are noised data; of a student's states, t of each
    phase's start and end in turn."""
    num_rollouts: int
    """Recorded solves of each record."""
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
