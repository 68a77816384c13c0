"""From a configuration to a trainer: what a checked plan needs is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from common.config import Config
from shards.reading.loader import ShardLoader
from shards.reading.reader import ShardSet
from stage2_student.student.lora import Adapted
from stage2_student.student.student import Student, add_adapters, load_base, training_dtype
from stage2_student.training.ancestry import Ancestry, take_over
from stage2_student.training.checkpoint import Learner, restore
from stage2_student.training.ema import Ema
from stage2_student.training.phases import PREDICTION_OBJECTIVES
from stage2_student.training.plan import make_plan
from stage2_student.training.trainer import Trainer


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
    config: Config,
    accelerator: Accelerator,
    dataset: ShardSet,
    run: Path,
    checkpoint: Path | None,
    ancestry: Ancestry,
) -> tuple[Trainer, list[Adapted]]:
    """Load everything and take up the checkpoint, or the ancestor."""
    plan = make_plan(config, accelerator, dataset, run, checkpoint, ancestry)
    student, adapted = load_student(config, accelerator.device)
    take_over(student, ancestry)  # before an average is started from the weights
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
    trainer = Trainer(
        plan=plan,
        accelerator=accelerator,
        student=student,
        model=model,
        optimizer=optimizer,
        learner=learner,
        loader=loader,
    )
    return trainer, adapted
