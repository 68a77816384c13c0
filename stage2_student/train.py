"""Training: from shards to a run folder, alone or as one of many processes.

RUN/shards.json              the set that the run trains on, frozen
RUN/config.json              the resolved configuration
RUN/log.jsonl, tensorboard/  loss, learning rate, gradient norm, times
RUN/checkpoints/step-N/      see `state`; `lora/` (or `ema/`) in it is an adapter to sample with
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.errors import UsageError
from common.files import canonical_json, write_bytes_atomic
from common.schedule import make_alphas_cumprod
from common.signals import StopFlag
from shards.layout import FROZEN
from shards.loader import ShardLoader
from shards.reader import ShardSet
from stage2_student.adapter import Card
from stage2_student.checkpoint import CHECKPOINTS_DIR, list_checkpoints, newest_checkpoint, require_complete
from stage2_student.ema import Ema
from stage2_student.lora import Adapted, summarise
from stage2_student.losses import LossSettings
from stage2_student.settings import identity_of_run, require_same
from stage2_student.shard_facts import PREDICTION_OBJECTIVES, plan_phases, read_facts, require_base
from stage2_student.state import Learner, Progression, read_state, restore
from stage2_student.student import add_adapters, load_base, network_of, training_dtype
from stage2_student.trainer import Trainer

CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a training run came to."""

    run: Path
    """The run's folder."""
    steps: int
    """Optimizer steps done in all."""
    resumed_from: int | None
    """The step that this call went on from, or None if it started the run."""
    loss: float | None
    """Mean of the steps of the last log line; None if there was nothing left to do."""
    checkpoint: Path | None
    """The newest checkpoint."""
    adapted: tuple[Adapted, ...]
    """What has adapters."""
    seconds: float
    """Wall time of this call."""


def train(
    config: Config,
    *,
    shards: str | Path,
    run: Path,
    resume: str = "none",
    allow_incomplete: bool = False,
    exclude_damaged: bool = False,
    announce: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Train a student up to train.max_steps, or go on with one.

    Args:
        config: the resolved configuration.
        shards: folder or URL of a set.
        run: the run's folder, made if missing.
        resume: "none" (a new run), "auto" (go on from the newest complete checkpoint, or start), or the path of a
            checkpoint.
        allow_incomplete: train on what is committed although the set's plan has more.
        exclude_damaged: leave damaged samples out, under another set_hash.
        announce: takes lines for people, from the main process.

    Raises:
        UsageError: settings do not fit each other or the shards.
        DataError: shards, base or checkpoint are wrong, or a loss is not finite.
        Stopped: a signal came, and a checkpoint holds everything so far.
    """
    started = time.perf_counter()
    with StopFlag() as stop:
        accelerator = make_accelerator(config)
        checkpoint = find_start(run, resume)
        with accelerator.main_process_first():
            dataset = _open_set(run, shards, checkpoint, allow_incomplete, exclude_damaged)
        trainer, adapted = _prepare(config, accelerator, dataset, run, checkpoint)
        if accelerator.is_main_process:
            for line in (*summarise(adapted), _describe(trainer)):
                announce(line)
            dataset.freeze(run)
            write_bytes_atomic(run / CONFIG_FILE, canonical_json(config.as_dict()))
        accelerator.wait_for_everyone()
        resumed_from = trainer.progression.step if checkpoint is not None else None
        loss = trainer.train(stop)
    return TrainResult(
        run=run,
        steps=trainer.progression.step,
        resumed_from=resumed_from,
        loss=loss,
        checkpoint=newest_checkpoint(run / CHECKPOINTS_DIR),
        adapted=tuple(adapted),
        seconds=time.perf_counter() - started,
    )


def make_accelerator(config: Config) -> Accelerator:
    """Start accelerate: the processes of this launch, their devices, mixed precision.

    Raises:
        UsageError: the device cannot do what is asked of it.
    """
    precision, device = config.train.mixed_precision, config.model.device
    cpu = device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f'model.device: received "{device}", but there is no CUDA device; set "auto" or "cpu"')
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if cpu and precision == "fp16":
        raise UsageError('train.mixed_precision: "fp16" needs a GPU; set "no" or "bf16"')
    return Accelerator(mixed_precision=precision, cpu=cpu)


def find_start(run: Path, resume: str) -> Path | None:
    """Return the checkpoint to go on from, or None to start.

    Raises:
        UsageError: the folder holds a run already, or a newer checkpoint than the one asked for.
        DataError: the checkpoint that was asked for is missing or damaged.
    """
    root = run / CHECKPOINTS_DIR
    if resume == "auto":
        return newest_checkpoint(root)
    if resume == "none":
        if list_checkpoints(root):
            raise UsageError(f"{run} holds a run; go on with it by --resume auto, or give another --out folder")
        return None
    checkpoint = require_complete(Path(resume))
    later = [other for other in list_checkpoints(root) if other.name > checkpoint.name]
    if later:
        raise UsageError(
            f"{run} holds the newer {later[-1].name}; give another --out folder to go on from {resume}"
        )
    return checkpoint


def _open_set(
    run: Path, location: str | Path, checkpoint: Path | None, allow_incomplete: bool, exclude_damaged: bool
) -> ShardSet:
    """Open the set that the run froze when it started, or all of it for a run that starts now."""
    if checkpoint is not None and (run / FROZEN).exists():
        return ShardSet.open_frozen(run, location)
    return ShardSet.open(location, allow_incomplete=allow_incomplete, exclude_damaged=exclude_damaged)


def _prepare(
    config: Config, accelerator: Accelerator, dataset: ShardSet, run: Path, checkpoint: Path | None
) -> tuple[Trainer, list[Adapted]]:
    """Load everything, check that it fits, and take up the checkpoint."""
    facts = read_facts(dataset)
    phases, timesteps = plan_phases(config.train, facts)
    network_of(config)
    base_path = config.resolve(config.model.checkpoint, "model.checkpoint")
    with accelerator.main_process_first():  # the others then find it cached
        base = fingerprint(base_path, "base")
    require_base(facts, base, dataset.manifest.identity.get("name", "the set"))
    world = accelerator.num_processes
    identity = identity_of_run(config, world=world, base_fingerprint=base, set_hash=dataset.set_hash)
    progression = Progression()
    if checkpoint is not None:
        progression, saved = read_state(checkpoint)
        require_same(identity, saved, checkpoint)
    student, _ = load_base(config, training_dtype(config), accelerator.device)
    adapted = add_adapters(student, config)
    if config.train.gradient_checkpointing:
        student.unet.enable_gradient_checkpointing()
        if config.lora.writenet:
            student.writenet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        student.trainable().values(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay
    )
    ema = Ema(student.trainable(), config.train.ema_decay) if config.train.ema_decay else None
    learner = Learner(parameters=student.trainable(), optimizer=optimizer, ema=ema)
    loader = ShardLoader(
        dataset,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        rank=accelerator.process_index,
        world=world,
        window_shards=config.shards.window_shards,
        num_workers=config.train.num_workers,
        predictions=config.train.objective in PREDICTION_OBJECTIVES,
        pin_memory=accelerator.device.type == "cuda",
    )
    model, prepared = accelerator.prepare(student, optimizer)
    if checkpoint is not None:
        restore(checkpoint, learner)
        loader.load_state_dict(progression.loader)
        if accelerator.scaler is not None and progression.scaler is not None:
            accelerator.scaler.load_state_dict(progression.scaler)
    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        student=student,
        model=model,
        optimizer=prepared,
        learner=learner,
        loader=loader,
        shards=dataset,
        settings=LossSettings(
            train=config.train,
            phases=phases,
            alphas_cumprod=make_alphas_cumprod().to(accelerator.device),
        ),
        num_rollouts=facts.num_rollouts,
        progression=progression,
        card=Card(
            objective=config.train.objective,
            sampler="lcm" if config.train.objective == "lcm" else "ddim",
            timesteps=tuple(timesteps.tolist()),
            step=progression.step,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            base_fingerprint=base,
            set_hash=dataset.set_hash,
            config=config.as_dict(),
        ),
        identity=identity,
        run=run,
    )
    return trainer, adapted


def _describe(trainer: Trainer) -> str:
    config, card = trainer.config, trainer.card
    samples = config.train.batch_size * config.train.gradient_accumulation * trainer.accelerator.num_processes
    return (
        f"objective {card.objective}, {card.num_steps} steps at t = {list(card.timesteps)};"
        f" {len(trainer.shards)} samples, {samples} a step, from step {trainer.progression.step} to"
        f" {config.train.max_steps} on {trainer.accelerator.num_processes} x {trainer.accelerator.device}"
    )
