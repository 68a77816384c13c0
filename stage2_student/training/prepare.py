"""From a configuration to a trainer: what a checked plan needs is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from common.compiling import prepare_networks
from common.config import Config
from shards.reading.loader import ShardLoader
from shards.reading.reader import ShardSet
from stage2_student.student.folding import FoldedAdapters
from stage2_student.student.lora import Adapted, leave_types_to_autocast
from stage2_student.student.student import MIXED, Student, add_adapters, load_base, training_dtype
from stage2_student.training.ancestry import Ancestry, take_over
from stage2_student.training.checkpoint import Learner, restore
from stage2_student.training.critic import Critic
from stage2_student.training.ema import Ema
from stage2_student.training.phases import PREDICTION_OBJECTIVES
from stage2_student.training.plan import make_plan
from stage2_student.training.trainer import Trainer


def load_student(config: Config, device: torch.device) -> tuple[Student, list[Adapted]]:
    """Load the frozen base and add fresh adapters; those that will be folded need it in float32."""
    dtype = torch.float32 if config.train.fold_adapters else training_dtype(config)
    student, _ = load_base(config, dtype, device)
    adapted = add_adapters(student, config)
    if config.train.mixed_precision != "no":
        leave_types_to_autocast(student)
    if config.train.gradient_checkpointing:
        student.unet.enable_gradient_checkpointing()
        if config.lora.writenet:
            student.writenet.enable_gradient_checkpointing()
    return student, adapted


def fold(config: Config, student: Student) -> FoldedAdapters:
    """Fold the student's adapters; `Student.trainable` knows nothing of them from here on."""
    dtype = training_dtype(config)
    compute_dtype = MIXED.get(config.train.mixed_precision, dtype)
    if student.device.type == "cuda" and compute_dtype != torch.float32:
        torch.set_float32_matmul_precision(
            "high"
        )  # TF32, for B A and its gradients: the network is in a half type
    return FoldedAdapters(student.parts.values(), dtype=dtype, compute_dtype=compute_dtype)


def make_learner(config: Config, student: Student, *, fused: bool = False) -> Learner:
    """Make the optimizer, the adapters' average and the critic if the run has them, and fold if it folds.

    Args:
        config: the resolved configuration.
        student: with adapters that have their first values.
        fused: one kernel for all parameters, which can leave them alone where the device says so.
    """
    train, parameters = config.train, student.trainable()
    settings: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    optimizer = torch.optim.AdamW(parameters.values(), **settings, fused=fused or None)
    folded = fold(config, student) if train.fold_adapters else None
    swapped = {} if folded is None else {"swapped": folded.refresh}
    ema = Ema(parameters, train.ema_decay, **swapped) if train.ema_decay else None
    critic = Critic(student.unet.feature_channels, train).to(student.device) if train.critic_weight else None
    return Learner(parameters=parameters, optimizer=optimizer, ema=ema, folded=folded, critic=critic)


def looks_later(device: torch.device) -> bool:
    """Whether a step's losses are looked at when later steps were given to the device (see `training.finite`)."""
    return device.type == "cuda"


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
    look_later = looks_later(accelerator.device)
    learner = make_learner(config, student, fused=look_later)
    prepare_networks(config.model, *student.parts.values())
    loader = make_loader(config, accelerator, dataset)  # never to accelerate: ours is exact, see shards
    optimizer = accelerator.prepare(learner.optimizer)
    # Wrapped for the adapters' gradients, which are not the network's own once they are folded.
    model = accelerator.prepare_model(student, evaluation_mode=learner.folded is not None)
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
        look_later=look_later,
    )
    return trainer, adapted
