"""The training loop: optimizer steps, what is logged of them, and when a checkpoint is written."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from common.config import Config
from common.errors import DataError
from common.progress import Progress
from common.schedule import make_alphas_cumprod
from common.signals import StopFlag
from shards.reading.loader import ShardLoader
from shards.records.batch import Batch
from stage2_student.student.checkpoint_folders import CHECKPOINTS_DIR, prune, save_checkpoint
from stage2_student.student.student import Student
from stage2_student.training.checkpoint import RESUME_FILES, Learner, Progression, write_state
from stage2_student.training.held_out_loss import HeldOut
from stage2_student.training.losses import per_sample, region_weights
from stage2_student.training.objectives import LossSettings, loss_of, select_rollout
from stage2_student.training.phases import draw, trains_at_starts
from stage2_student.training.plan import Plan
from stage2_student.training.runlog import RunLog


def learning_rate(step: int, config: Config) -> float:
    """Return the learning rate of a step, a pure function, so that a resumed run has nothing to restore.

    Args:
        step: from 0.
        config: its [train] section.
    """
    train = config.train
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    fraction = (step - train.warmup_steps) / max(train.max_steps - train.warmup_steps, 1)
    if train.schedule == "linear":
        return train.learning_rate * (1 - min(fraction, 1.0))
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))


@dataclass(slots=True)
class _Clock:
    """Time since the last log line, seconds."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    samples: int = 0
    steps: int = 0


@dataclass(kw_only=True)
class Trainer:
    """One run in one process. `student` is what is adapted; `model` the same, wrapped for distributed training."""

    plan: Plan
    accelerator: Accelerator
    student: Student
    model: torch.nn.Module
    optimizer: Any
    learner: Learner
    loader: ShardLoader
    held_out: HeldOut | None = None
    _clock: _Clock = field(default_factory=_Clock)
    _last_loss: float | None = None

    def __post_init__(self) -> None:
        table = make_alphas_cumprod().to(self.accelerator.device)
        self._loss_settings = LossSettings(
            train=self.plan.config.train, phases=self.plan.phases, alphas_cumprod=table
        )

    @property
    def progression(self) -> Progression:
        """Where the run stands; changes as it goes."""
        return self.plan.progression

    def train(self, stop: StopFlag) -> float | None:
        """Train up to train.max_steps; returns the mean loss of the last log line.

        Raises:
            Stopped: a signal came; a checkpoint holds everything so far.
            DataError: a loss is not finite.
        """
        state, total = self.progression, self.plan.config.train.max_steps
        main = self.accelerator.is_main_process
        batches = iter(self.loader)
        self._clock = _Clock()
        with (
            RunLog(self.plan.run, state.step, self.plan.config) if main else nullcontext() as log,
            Progress(total, "train", "step", initial=state.step) if main else nullcontext() as progress,
        ):
            saved = state.step
            while state.step < total:
                facts = self.optimizer_step(batches)
                if log is not None and facts is not None:
                    log.write(state.step, facts)
                if progress is not None:
                    progress.update(1, **({"loss": f"{facts['loss']:.4g}"} if facts else {}))
                if self.held_out is not None and self.held_out.is_due(state.step):
                    measured = self._measure(self.held_out)
                    if log is not None:
                        log.write(state.step, measured)
                stopping = self._agree(stop.stop_requested)
                if stopping or state.step == total or state.step % self.plan.config.train.checkpoint_every == 0:
                    before = time.perf_counter()
                    self.save()
                    self._clock.started += time.perf_counter() - before  # not the steps' time
                    saved = state.step
                if stopping and state.step < total:
                    stop.stop_requested = True  # also on ranks that got no signal
                    stop.raise_if_requested(f"step {saved} of {total} is in a checkpoint")
        return self._last_loss

    def _measure(self, held_out: HeldOut) -> dict[str, float]:
        """Measure the loss on records that are not trained on; it is not the steps' time."""
        before = time.perf_counter()
        measured = held_out.measure(self.losses, self.learner.ema, self.accelerator)
        self._clock.started += time.perf_counter() - before
        return measured

    def save(self) -> None:
        """Write a checkpoint from the main process; the others wait."""
        if self.accelerator.is_main_process:
            self.progression.loader = self.loader.state_dict()
            scaler = self.accelerator.scaler
            self.progression.scaler = None if scaler is None else scaler.state_dict()
            card = self.plan.card.at_step(self.progression.step)
            root = self.plan.run / CHECKPOINTS_DIR
            save_checkpoint(
                root,
                self.progression.step,
                lambda folder: write_state(folder, self.learner, self.progression, card, self.plan.identity),
            )
            train = self.plan.config.train
            prune(root, train.keep_checkpoints, strip=RESUME_FILES if train.keep_adapters else ())
        self.accelerator.wait_for_everyone()

    def optimizer_step(self, batches: Iterator[Batch]) -> dict[str, float] | None:
        """Do one optimizer step; returns what to log if it is time to."""
        train, state, clock = self.plan.config.train, self.progression, self._clock
        rate = learning_rate(state.step, self.plan.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, seen = [], []
        for micro in range(train.gradient_accumulation):
            before = time.perf_counter()
            batch = next(batches)
            clock.waited += time.perf_counter() - before
            last = micro == train.gradient_accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                of_batch = self.losses(batch)
                self.accelerator.backward(of_batch.mean() / train.gradient_accumulation)
            losses.append(of_batch.detach())
            seen.append(batch.indices)
        norm = self.accelerator.clip_grad_norm_(self.learner.parameters.values(), train.max_grad_norm or math.inf)
        loss = self._checked_loss(torch.cat(losses), torch.cat(seen), norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if self.learner.ema is not None:
            self.learner.ema.update(state.step)
        state.loss_sum, state.loss_count = state.loss_sum + loss, state.loss_count + 1
        clock.samples += sum(map(len, seen)) * self.accelerator.num_processes
        clock.steps += 1
        due = state.step % train.log_every == 0 or state.step == train.max_steps
        return self._facts(rate, float(norm)) if due else None

    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of each sample of a batch, (B,) float32."""
        train, device = self.plan.config.train, self.accelerator.device
        conditioning = batch.conditioning.to(device, self.student.dtype)
        samples = list(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True))
        draws = draw(
            samples,
            seed=train.seed,
            num_rollouts=self.plan.facts.num_rollouts,
            phases=self.plan.phases,
            starts_only=trains_at_starts(train),
        )
        rollouts = select_rollout(
            batch.rollout_latents, batch.rollout_timesteps, batch.x0_cond, batch.x0_uncond, draws.rollout
        ).to(device)
        draws = draws.to(device)
        control = None
        if not self.student.adapts_writenet:
            with torch.no_grad(), self.accelerator.autocast():
                control = self.student.control(conditioning)

        def predict(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
            eps: Tensor = self.model(noisy_latents, timesteps, conditioning, control)
            return eps

        def predict_target(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
            ema = self.learner.ema
            with ema.in_place() if ema is not None and train.pcm_target == "ema" else nullcontext():
                eps: Tensor = self.student(noisy_latents, timesteps, conditioning, control)
            return eps

        loss = loss_of(train)(rollouts, draws, predict, predict_target, self._loss_settings)
        if train.text_region_weight == 1:
            return per_sample(loss)
        size = (int(loss.shape[-2]), int(loss.shape[-1]))
        return per_sample(loss, region_weights(conditioning.hints.positions, size, train.text_region_weight))

    def _checked_loss(self, losses: Tensor, indices: Tensor, norm: Tensor) -> float:
        """Return the mean loss over all ranks, before the weights are touched.

        Raises:
            DataError: a sample's loss on any rank, or the gradient, is not finite; every rank names the same.
        """
        mean = losses.double().mean()
        if self.accelerator.num_processes > 1:
            mean = self.accelerator.reduce(mean, reduction="mean")  # not finite on all ranks if it is not on one
        finite = math.isfinite(float(mean))
        overflow_is_normal = self.accelerator.scaler is not None  # fp16: the scaler skips the step and adapts
        if finite and (overflow_is_normal or math.isfinite(float(norm))):
            return float(mean)
        bad = indices.tolist() if finite else indices[~torch.isfinite(losses).cpu()].tolist()
        if self.accelerator.num_processes > 1:
            bad = gather_object(bad)
        keys = ", ".join(f"{self.plan.shards.key(index)} (index {index})" for index in bad[:8])
        what = "the gradient's norm" if finite else "the loss"
        raise DataError(
            f"step {self.progression.step + 1}: {what} is not finite on sample {keys}"
            f"{f' and {len(bad) - 8} more' if len(bad) > 8 else ''}; nothing was changed by this step: lower"
            " train.learning_rate, or look with `verify` for samples that hold NaN; the last checkpoint is intact"
        )

    def _agree(self, stop_requested: bool) -> bool:
        """Return whether any rank was asked to stop, the same on all."""
        if self.accelerator.num_processes == 1:
            return stop_requested
        flag = torch.tensor(float(stop_requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def _facts(self, rate: float, norm: float) -> dict[str, float]:
        state, clock = self.progression, self._clock
        seconds = max(time.perf_counter() - clock.started, 1e-9)
        self._last_loss = state.loss_sum / state.loss_count
        facts = {
            "epoch": self.loader.epoch,
            "loss": self._last_loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "samples_per_second": clock.samples / seconds,
            "step_seconds": seconds / clock.steps,
            "data_wait_seconds": clock.waited / clock.steps,
        }
        state.loss_sum, state.loss_count = 0.0, 0
        self._clock = _Clock()
        return facts
