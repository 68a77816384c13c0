"""Training: from shards to a run folder, alone or as one of many processes.

RUN/shards.json              the set that the run trains on, frozen
RUN/config.json              the resolved configuration
RUN/adapted.json             every module that has an adapter
RUN/ancestors.json           the students that it was started from, if any (see `training.ancestry`)
RUN/log.jsonl, tensorboard/  loss, learning rate, gradient norm, times, held-out loss
RUN/checkpoints/step-N/      see `training.checkpoint`; `lora/` (or `ema/`) in it is an adapter to sample with
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list

from common.compiling import make_deterministic
from common.config import Config
from common.errors import AppError, UsageError
from common.files import canonical_json, hold, write_bytes_atomic
from common.signals import StopFlag
from shards.files.names import FROZEN
from shards.reading.reader import ShardSet
from stage2_student.student.checkpoint_folders import (
    CHECKPOINTS_DIR,
    list_checkpoints,
    newest_checkpoint,
    require_complete,
)
from stage2_student.student.lora import Adapted, summarise
from stage2_student.training.ancestry import Ancestry, describe, find_ancestry, write_ancestors
from stage2_student.training.held_out_loss import HeldOut
from stage2_student.training.prepare import prepare
from stage2_student.training.trackers import require_trackers
from stage2_student.training.trainer import Trainer

logger = logging.getLogger(__name__)

CONFIG_FILE, ADAPTED_FILE, LOCK_FILE = "config.json", "adapted.json", ".lock"
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Ways of accelerate that split parameters among processes."""


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
    ancestor: Path | None = None,
    held_out: str | Path | None = None,
    max_minutes: float | None = None,
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
        ancestor: start from this adapter's weights: a run's folder, a checkpoint, an adapter's folder, or an
            exported LoRA. A run that goes on does not read them again.
        held_out: folder or URL of a set whose loss is logged every train.held_out_every steps.
        max_minutes: stop after the first step that ends so long after the start of this call, as by a signal.
        allow_incomplete: train on what is committed although the set's plan has more.
        exclude_damaged: leave damaged samples out, under another set_hash; a run that goes on then draws the order
            of what is left anew, from its next epoch on.
        announce: takes lines for people, from the main process.

    Raises:
        UsageError: settings do not fit each other or the shards.
        DataError: shards, base or checkpoint are wrong, or a loss is not finite.
        Stopped: a signal came or the time was up, and a checkpoint holds everything so far.
    """
    started = time.monotonic()
    require_trackers(config.train.trackers)
    with ExitStack() as held:
        accelerator = make_accelerator(config)
        checkpoint, ancestry = _take_run(accelerator, run, resume, ancestor, held)
        with accelerator.main_process_first():
            dataset = _open_set(run, shards, checkpoint, allow_incomplete, exclude_damaged)
        trainer, adapted = prepare(config, accelerator, dataset, run, checkpoint, ancestry)
        if held_out is not None:
            with accelerator.main_process_first():
                trainer.held_out = HeldOut.open(held_out, trainer.plan)
        until = None if max_minutes is None else started + 60 * max_minutes
        stop = held.enter_context(StopFlag(until))  # until here there is nothing to keep: a signal ends it at once
        if accelerator.is_main_process:
            dataset.freeze(run)
            write_bytes_atomic(run / CONFIG_FILE, canonical_json(config.as_dict()))
            write_bytes_atomic(run / ADAPTED_FILE, canonical_json([asdict(module) for module in adapted]))
            write_ancestors(run, ancestry)
            summary = (*summarise(adapted), f"each by name: {run / ADAPTED_FILE}")
            for line in (*summary, *describe(ancestry), _describe(trainer)):
                announce(line)
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
            seconds=time.monotonic() - started,
        )


def _take_run(
    accelerator: Accelerator, run: Path, resume: str, ancestor: Path | None, held: ExitStack
) -> tuple[Path | None, Ancestry]:
    """Lock the run's folder and only then choose the start, in the main process, for all.

    Raises:
        AppError: on every process the same, see `hold_run`, `find_start` and `find_ancestry`.
    """
    found: list[tuple[Path | None, Ancestry] | AppError] = [(None, Ancestry())]
    if accelerator.is_main_process:
        try:
            held.enter_context(hold_run(run))
            checkpoint = find_start(run, resume)
            found = [(checkpoint, find_ancestry(run, ancestor, checkpoint, resume))]
        except AppError as error:
            found = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    start = found[0]
    if isinstance(start, AppError):
        raise start
    return start


@contextmanager
def hold_run(run: Path) -> Iterator[None]:
    """Keep a second training out of a run's folder for as long as this one lives.

    Raises:
        UsageError: another process trains there.
    """
    run.mkdir(parents=True, exist_ok=True)
    with hold(run / LOCK_FILE) as held:
        if not held:
            raise UsageError(f"another process is training in {run}; wait for it, or give another --out folder")
        yield


def make_accelerator(config: Config) -> Accelerator:
    """Start accelerate: the processes of this launch, their devices, mixed precision.

    Raises:
        UsageError: the device cannot do what is asked of it.
    """
    if config.train.deterministic:
        make_deterministic()
    precision, device = config.train.mixed_precision, config.model.device
    cpu = device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f'model.device: received "{device}", but there is no CUDA device; set "auto" or "cpu"')
    if device.startswith("cuda:") and "LOCAL_RANK" not in os.environ:  # a launcher gives each process its own
        torch.cuda.set_device(device)
    if cpu and precision == "fp16":
        raise UsageError('train.mixed_precision: "fp16" needs a GPU; set "no" or "bf16"')
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    if accelerator.distributed_type in SHARDING:
        raise UsageError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which shards what is trained; an"
            " adapter is small: configure plain data parallelism (accelerate launch --multi_gpu)"
        )
    if accelerator.num_processes == 1 and launched_alone(os.environ):
        logger.warning(
            "accelerate launch was asked for several processes and started this one alone, as it does on CPUs and"
            " without --multi_gpu: use --multi_gpu, or torchrun --nproc_per_node N pipeline.py train ..."
        )
    # Ours is train.gradient_accumulation; one set in accelerate's own configuration would scale the loss again.
    accelerator.gradient_accumulation_steps = 1
    return accelerator


def launched_alone(environ: Mapping[str, str]) -> bool:
    """Tell whether accelerate's launcher was asked for several processes and started one by its simple launcher.

    That one leaves the others' address in the environment, and no process's number.
    """
    return {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environ.keys() and "RANK" not in environ


def find_start(run: Path, resume: str) -> Path | None:
    """Return the checkpoint to go on from, or None to start.

    Raises:
        UsageError: the folder holds a run already, or a newer checkpoint than the one asked for.
        DataError: the checkpoint that was asked for is missing or damaged, or all that "auto" finds are.
    """
    root = run / CHECKPOINTS_DIR
    if resume == "auto":
        return newest_checkpoint(root, to_resume=True)
    if resume == "none":
        if list_checkpoints(root):
            raise UsageError(f"{run} holds a run; go on with it by --resume auto, or give another --out folder")
        return None
    checkpoint = require_complete(Path(resume), to_resume=True)
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
        return ShardSet.open_frozen(run, location, exclude_damaged=exclude_damaged)
    return ShardSet.open(location, allow_incomplete=allow_incomplete, exclude_damaged=exclude_damaged)


def _describe(trainer: Trainer) -> str:
    config, card, launch = trainer.plan.config, trainer.plan.card, trainer.accelerator
    held_out, every = trainer.held_out, config.train.held_out_every
    measured = "" if held_out is None else f"; loss of {held_out.count} held-out samples every {every} steps"
    return (
        f"objective {card.objective}, {card.num_steps} steps at t = {list(card.timesteps)};"
        f" {len(trainer.plan.shards)} samples, {trainer.samples_a_step} a step (the UNet's work of"
        f" {trainer.unet_passes:.0f} forward passes), from step {trainer.progression.step} to"
        f" {config.train.max_steps} on {launch.num_processes} x {launch.device}{measured}"
    )
