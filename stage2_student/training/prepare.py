"""From a configuration to a trainer: what is checked first, then what is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.differences import require_same
from common.schedule import make_alphas_cumprod
from shards.reading.loader import ShardLoader
from shards.reading.reader import ShardSet
from stage2_student.student.adapter import Card
from stage2_student.student.lora import Adapted
from stage2_student.student.shard_facts import (
    PREDICTION_OBJECTIVES,
    ShardFacts,
    plan_phases,
    read_facts,
    require_base,
)
from stage2_student.student.student import Student, add_adapters, load_base, training_dtype
from stage2_student.training.checkpoint import Learner, Progression, read_state, restore
from stage2_student.training.ema import Ema
from stage2_student.training.objectives import LossSettings
from stage2_student.training.phases import Phases
from stage2_student.training.run_identity import identity_of_run
from stage2_student.training.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run is to do, checked before anything large is loaded."""

    facts: ShardFacts
    """Of the shards."""
    phases: Phases
    """Of their solves."""
    card: Card
    """Of the adapters that will be written."""
    identity: dict[str, Any]
    """Settings that a resumed run must share."""
    progression: Progression
    """Where the run stands: at its start, or where the checkpoint stood."""


def make_plan(config: Config, accelerator: Accelerator, dataset: ShardSet, checkpoint: Path | None) -> Plan:
    """Check that configuration, shards, base and checkpoint fit each other."""
    facts = read_facts(dataset)
    phases, timesteps = plan_phases(config.train, facts)
    base_path = config.resolve(config.model.checkpoint, "model.checkpoint")
    with accelerator.main_process_first():  # the others then find it cached
        base = fingerprint(base_path, "base")
    require_base(facts, base, "the shards")
    identity = identity_of_run(
        config, world=accelerator.num_processes, base_fingerprint=base, set_hash=dataset.set_hash
    )
    progression = Progression()
    if checkpoint is not None:
        progression, saved = read_state(checkpoint)
        remedy = "restore them, or start a new run in another --out folder"
        require_same(identity, saved, f"{checkpoint}: cannot be resumed with other settings", remedy)
    card = Card(
        objective=config.train.objective,
        sampler="lcm" if config.train.objective == "lcm" else "ddim",
        timesteps=tuple(timesteps.tolist()),
        step=progression.step,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        base_fingerprint=base,
        set_hash=dataset.set_hash,
        config=config.as_dict(),
    )
    return Plan(facts=facts, phases=phases, card=card, identity=identity, progression=progression)


def load_student(config: Config, device: torch.device) -> tuple[Student, list[Adapted]]:
    """Load the frozen base and add fresh adapters."""
    student, _ = load_base(config, training_dtype(config), device)
    adapted = add_adapters(student, config)
    if config.train.gradient_checkpointing:
        student.unet.enable_gradient_checkpointing()
        if config.lora.writenet:
            student.writenet.enable_gradient_checkpointing()
    return student, adapted


def make_learner(config: Config, student: Student) -> Learner:
    """Make the optimizer over the adapters, and their average if the run keeps one."""
    train, parameters = config.train, student.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), lr=train.learning_rate, weight_decay=train.weight_decay)
    ema = Ema(parameters, train.ema_decay) if train.ema_decay else None
    return Learner(parameters=parameters, optimizer=optimizer, ema=ema)


def make_loader(config: Config, accelerator: Accelerator, dataset: ShardSet) -> ShardLoader:
    """Make this rank's loader; objectives that need the teacher's predictions read them too."""
    return ShardLoader(
        dataset,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        window_shards=config.shards.window_shards,
        num_workers=config.train.num_workers,
        predictions=config.train.objective in PREDICTION_OBJECTIVES,
        pin_memory=accelerator.device.type == "cuda",
    )


def prepare(
    config: Config, accelerator: Accelerator, dataset: ShardSet, run: Path, checkpoint: Path | None
) -> tuple[Trainer, list[Adapted]]:
    """Load everything and take up the checkpoint."""
    plan = make_plan(config, accelerator, dataset, checkpoint)
    student, adapted = load_student(config, accelerator.device)
    learner = make_learner(config, student)
    loader = make_loader(config, accelerator, dataset)
    model, optimizer = accelerator.prepare(
        student, learner.optimizer
    )  # never the loader: ours is exact, see shards
    if checkpoint is not None:
        restore(checkpoint, learner)
        loader.load_state_dict(plan.progression.loader)
        if accelerator.scaler is not None and plan.progression.scaler is not None:
            accelerator.scaler.load_state_dict(plan.progression.scaler)
    table = make_alphas_cumprod().to(accelerator.device)
    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        student=student,
        model=model,
        optimizer=optimizer,
        learner=learner,
        loader=loader,
        shards=dataset,
        settings=LossSettings(train=config.train, phases=plan.phases, alphas_cumprod=table),
        num_rollouts=plan.facts.num_rollouts,
        progression=plan.progression,
        card=plan.card,
        identity=plan.identity,
        run=run,
    )
    return trainer, adapted
