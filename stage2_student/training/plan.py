"""What a training run is to do, and whether configuration, shards, base and checkpoint fit each other."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.differences import require_same
from shards.reading.reader import ShardSet
from stage2_student.student.adapter import LORA_DIR, Card, read_card
from stage2_student.student.shard_facts import ShardFacts, read_facts, require_base
from stage2_student.training.ancestry import Ancestry, require_fit
from stage2_student.training.checkpoint import Progression, read_state
from stage2_student.training.phases import Phases, plan_phases
from stage2_student.training.run_identity import comparable, identity_of_run, rounded_otherwise

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run is to do, checked before anything large is loaded."""

    config: Config
    """The resolved configuration."""
    run: Path
    """The run's folder."""
    shards: ShardSet
    """What it trains on."""
    facts: ShardFacts
    """Of the shards."""
    phases: Phases
    """Of their rollouts."""
    card: Card
    """Of the adapters that will be written."""
    identity: dict[str, Any]
    """Settings that a resumed run must share."""
    progression: Progression
    """Where the run stands: at its start, or where the checkpoint stood."""


def make_plan(
    config: Config,
    accelerator: Accelerator,
    shards: ShardSet,
    run: Path,
    checkpoint: Path | None,
    ancestry: Ancestry,
) -> Plan:
    """Check that configuration, shards, base and checkpoint fit each other.

    Args:
        config: the resolved configuration.
        accelerator: of this launch.
        shards: what is trained on.
        run: the run's folder.
        checkpoint: to go on from, or None to start.
        ancestry: what the run starts from, or was started from.

    Raises:
        UsageError: objective, number of phases and shards do not fit each other.
        DataError: the shards are of another base, the checkpoint is of a run with other settings, or the adapter
            to start from is of another kind.
    """
    facts = read_facts(shards)
    phases, timesteps = plan_phases(config.train, facts)
    with accelerator.main_process_first():  # the others then find it cached
        base = fingerprint(config.find_checkpoint(), "base")
    require_base(facts, base, "the shards")
    require_fit(config, ancestry, base)
    identity = identity_of_run(
        config,
        world=accelerator.num_processes,
        base_fingerprint=base,
        set_hash=shards.set_hash,
        ancestor=ancestry.sha256,
    )
    progression = Progression()
    if checkpoint is not None:
        progression, saved = read_state(checkpoint)
        if saved.get("set_hash") in shards.replaces:
            saved["set_hash"] = shards.set_hash
            _go_on_without(progression, shards)
        remedy = "restore them, or start a new run in another --out folder"
        what = f"{checkpoint}: cannot be resumed with other settings"
        require_same(comparable(identity), comparable(saved), what, remedy)
        if changed := rounded_otherwise(config, read_card(checkpoint / LORA_DIR).config):
            logger.warning("the run goes on with %s: results differ from before in rounding", ", ".join(changed))
    card = Card(
        objective=config.train.objective,
        sampler="lcm" if config.train.objective == "lcm" else "ddim",
        timesteps=tuple(timesteps.tolist()),
        grid=config.train.grid,
        step=progression.step,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        base_fingerprint=base,
        set_hash=shards.set_hash,
        config=config.as_dict(),
        ancestors=ancestry.ancestors,
    )
    return Plan(
        config=config,
        run=run,
        shards=shards,
        facts=facts,
        phases=phases,
        card=card,
        identity=identity,
        progression=progression,
    )


def _go_on_without(progression: Progression, shards: ShardSet) -> None:
    """Move a run on to the set that is left of its own: the order is that of another set, so an epoch starts."""
    epoch = int(progression.loader["epoch"]) + 1
    progression.loader = {**progression.loader, "set_hash": shards.set_hash, "epoch": epoch, "position": 0}
    logger.warning(
        "damaged samples are left out of the run's set, %d stay: from here on it is another set, and the run goes"
        " on at the start of epoch %d in that one's order; weights, optimizer and step stay as they are",
        len(shards),
        epoch,
    )
