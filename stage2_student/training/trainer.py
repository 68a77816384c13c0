"""The training loop: optimizer steps, what is logged of them, and when a checkpoint is written."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from common.compiling import as_it_is
from common.config import Config
from common.progress import Progress, format_seconds
from common.schedule import make_alphas_cumprod
from common.signals import StopFlag
from shards.reading.loader import ShardLoader
from shards.records.batch import Batch
from stage2_student.student.base_features import BaseFeatures
from stage2_student.student.checkpoint_folders import CHECKPOINTS_DIR, prune, save_checkpoint
from stage2_student.student.student import Student
from stage2_student.training.agreement import StopVote, average_gradients
from stage2_student.training.checkpoint import RESUME_FILES, Learner, Progression, write_state
from stage2_student.training.finite import LossCheck
from stage2_student.training.held_out_loss import HeldOut
from stage2_student.training.losses import per_sample, region_weights
from stage2_student.training.objectives import LossSettings, loss_of, select_rollout
from stage2_student.training.perception import Perception
from stage2_student.training.phases import draw, trains_at_starts
from stage2_student.training.plan import Plan
from stage2_student.training.runlog import RunLog
from stage2_student.training.work import count_work


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
    look_later: bool
    """Look at losses, and at other processes' wish to stop, when more was given to the device meanwhile, so that
    it never waits. Needs an optimizer that is fused."""
    held_out: HeldOut | None = None
    unet_passes: float = field(init=False)
    """Work of the UNet in an optimizer step on all ranks, in forward passes of one sample."""
    _clock: _Clock = field(default_factory=_Clock)
    _last_loss: float | None = None
    _last_norm: float = math.nan

    def __post_init__(self) -> None:
        table = make_alphas_cumprod().to(self.accelerator.device)
        self._loss_settings = LossSettings(
            train=self.plan.config.train, phases=self.plan.phases, alphas_cumprod=table
        )
        self._perception = None
        if self.plan.config.train.looks_at_landings:
            self._perception = Perception(
                features=BaseFeatures(self.student.unet, self.learner.folded),
                train=self.plan.config.train,
                alphas_cumprod=table,
                critic=self.learner.critic,
            )
        work = count_work(self.plan.config.train, self.plan.phases)
        self.unet_passes = work.passes(self.plan.config.train) * self.samples_a_step
        rates = "train.learning_rate" + (", train.critic_weight" if self.learner.critic else "")
        self._check = LossCheck(accelerator=self.accelerator, name=self.plan.shards.key, to_lower=rates)
        self._vote = StopVote(self.accelerator, later=self.look_later)

    @property
    def samples_a_step(self) -> int:
        """Samples of an optimizer step, on all ranks."""
        train = self.plan.config.train
        return train.batch_size * train.gradient_accumulation * self.accelerator.num_processes

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
                    progress.update(1, **(_shown(facts) if facts else {}))
                if self.held_out is not None and self.held_out.is_due(state.step):
                    measured = self._measure(self.held_out)
                    if log is not None:
                        log.write(state.step, measured)
                stopping = self._vote.agree(stop.stop_requested)
                if stopping or state.step == total or state.step % self.plan.config.train.checkpoint_every == 0:
                    self._look()  # the wait for a GPU is the steps' time
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
        self._look()
        before = time.perf_counter()
        with as_it_is() if self.plan.config.model.compile else nullcontext():
            measured = held_out.measure(self.losses, self.learner.ema, self.accelerator)
        self._clock.started += time.perf_counter() - before
        return measured

    def save(self) -> None:
        """Write a checkpoint from the main process; the others wait.

        Raises:
            DataError: a loss since the last look is not finite; nothing is written.
        """
        self._look()
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
        """Do one optimizer step; returns what to log if it is time to.

        Raises:
            DataError: a loss is not finite, of this step or of one that was not looked at yet.
        """
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
        folded = self.learner.folded
        if folded is not None:
            average_gradients(folded.gradients(), self.accelerator)
        norm = self.accelerator.clip_grad_norm_(self.learner.parameters.values(), train.max_grad_norm or math.inf)
        found_inf = self._check.add(state.step + 1, torch.cat(losses), torch.cat(seen), norm)
        if not self.look_later:
            self._look()
        elif self.accelerator.scaler is None:  # else the scaler sets it, by the gradients
            self.learner.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if folded is not None:
            folded.refresh()
        if self.learner.critic is not None:
            self.learner.critic.step(self.accelerator)
        state.step += 1
        if self.learner.ema is not None:
            self.learner.ema.update(state.step)
        clock.samples += sum(map(len, seen)) * self.accelerator.num_processes
        clock.steps += 1
        due = state.step % train.log_every == 0 or state.step == train.max_steps
        if not due:
            return None
        self._look()
        return self._facts(rate)

    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of each sample of a batch, (B,) float32."""
        train, device = self.plan.config.train, self.accelerator.device
        sent = batch.send(device)
        conditioning = sent.conditioning.to(device, self.student.dtype)
        samples = list(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True))
        draws = draw(
            samples,
            seed=train.seed,
            num_rollouts=self.plan.facts.num_rollouts,
            phases=self.plan.phases,
            starts_only=trains_at_starts(train),
            per_sample=train.draws_per_sample,
        )
        draws = (draws.pin_memory() if device.type == "cuda" else draws).send(device)
        rollouts = select_rollout(
            sent.rollout_latents, sent.rollout_timesteps, sent.x0_cond, sent.x0_uncond, draws.rollout
        )
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

        settings = self._loss_settings
        if self._perception is not None:
            perceive = self._perception.of_batch(conditioning, draws, samples, self.accelerator.autocast)
            settings = replace(settings, perceive=perceive)
        loss = loss_of(train)(rollouts, draws, predict, predict_target, settings)
        weights = None
        if train.text_region_weight != 1:
            size = (int(loss.shape[-2]), int(loss.shape[-1]))
            weights = region_weights(conditioning.hints.positions, size, train.text_region_weight)
            weights = weights.repeat_interleave(train.draws_per_sample, dim=0)
        return per_sample(loss, weights).view(len(batch), train.draws_per_sample).mean(dim=1)

    def _look(self) -> None:
        """Add the losses of the steps since the last look to those to be logged.

        Raises:
            DataError: see `LossCheck.look`.
        """
        for loss, norm in self._check.look():
            self._last_norm = norm
            self.progression.loss_sum += loss
            self.progression.loss_count += 1

    def _facts(self, rate: float) -> dict[str, float]:
        state, clock, device = self.progression, self._clock, self.accelerator.device
        seconds = max(time.perf_counter() - clock.started, 1e-9)
        self._last_loss = state.loss_sum / state.loss_count
        facts = {
            "epoch": self.loader.epoch,
            "loss": self._last_loss,
            "learning_rate": rate,
            "grad_norm": self._last_norm,
            "samples_per_second": clock.samples / seconds,
            "unet_passes": self.unet_passes,
            "step_seconds": seconds / clock.steps,
            "data_wait_seconds": clock.waited / clock.steps,
            "seconds_left": (self.plan.config.train.max_steps - state.step) * seconds / clock.steps,
        }
        if self.learner.critic is not None:
            facts |= self.learner.critic.facts(self.accelerator)
        if device.type == "cuda":
            facts["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        state.loss_sum, state.loss_count = 0.0, 0
        self._clock = _Clock()
        return facts


def _shown(facts: dict[str, float]) -> dict[str, str]:
    """Return what of a log line is shown beside the progress."""
    shown = {"loss": f"{facts['loss']:.4g}", "left": format_seconds(facts["seconds_left"])}
    if "peak_memory_gib" in facts:
        shown["peak"] = f"{facts['peak_memory_gib']:.1f} GiB"
    return shown
