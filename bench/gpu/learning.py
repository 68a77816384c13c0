"""Training steps to be measured: ours, plain PEFT under autocast, and with the teacher in the process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional

from bench.gpu.measuring import Step
from bench.gpu.place import Place
from common.anytext2.conditioning import Conditioning, ConditioningBatch, Uncond
from common.anytext2.denoiser import Denoiser, guide, predict_branches
from common.config import Config
from common.ddim import consistency_value
from common.schedule import alphas_at, diffuse, guided, make_alphas_cumprod, predict_x0
from shards.reading.reader import ShardSet
from shards.records.batch import Batch, collate
from stage1_teacher.rendering.rendered_input import RenderedInput
from stage1_teacher.teacher.teacher import Teacher
from stage2_student.student.student import Student, find_modules, load_base, training_dtype
from stage2_student.train import make_accelerator
from stage2_student.training.ancestry import Ancestry
from stage2_student.training.losses import guided_solver_step, pseudo_huber
from stage2_student.training.prepare import make_loader, prepare
from stage2_student.training.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """A student and how it learns from a loss."""

    student: Student
    """What is adapted; called without gradients it is the target."""
    model: Callable[..., Tensor]
    """The same as a training step calls it."""
    accelerator: Accelerator
    learn: Callable[[Tensor], None]
    """Takes a loss, () float32, and does an optimizer step."""


def open_trainer(place: Place, *settings: str) -> Trainer:
    """Make a trainer of the place's shards, as `train` does."""
    config = place.config(*settings)
    dataset = ShardSet.open(place.shards)
    return prepare(config, make_accelerator(config), dataset, place.out / "run", None, Ancestry())[0]


def read_batch(place: Place, count: int) -> Batch:
    """Read the first records of the place's shards side by side, from where copies to a GPU are fast."""
    shards = ShardSet.open(place.shards)
    batch = collate([shards[index] for index in range(count)])
    return batch.pin_memory() if torch.cuda.is_available() else batch


def first_batch(trainer: Trainer) -> Batch:
    """Read a batch of a trainer's shards."""
    return next(iter(trainer.loader))


def in_memory(trainer: Trainer) -> Step:
    """Return the trainer's own step on one batch over and over."""
    batches = itertools.repeat(first_batch(trainer))
    return lambda: trainer.optimizer_step(batches)


def from_shards(trainer: Trainer, workers: int) -> Step:
    """Return the trainer's own step on batches that so many processes read; 0 for its own."""
    config = trainer.plan.config
    config = config.replace(train=config.train.replace(num_workers=workers))
    batches = iter(make_loader(config, trainer.accelerator, trainer.plan.shards))
    return lambda: trainer.optimizer_step(batches)


def ours(trainer: Trainer) -> Learner:
    """Return a trainer's student and optimizer, for losses of another kind."""

    def learn(loss: Tensor) -> None:
        trainer.accelerator.backward(loss)
        folded = trainer.learner.folded
        if folded is not None:
            folded.reduce(trainer.accelerator)
        trainer.accelerator.clip_grad_norm_(trainer.learner.parameters.values(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        if folded is not None:
            folded.refresh()

    return Learner(student=trainer.student, model=trainer.model, accelerator=trainer.accelerator, learn=learn)


# Plain PEFT.


def plain_peft(place: Place) -> Learner:
    """Adapt the same modules as diffusers' training scripts do, which change nothing of PEFT.

    The base in bfloat16, adapters in float32, autocast by accelerate, AdamW of PyTorch, nothing compiled. Source:
    diffusers' examples/text_to_image/train_text_to_image_lora.py.
    """
    config = place.config()
    accelerator = make_accelerator(config)
    student, _ = load_base(config, training_dtype(config), accelerator.device)
    _inject(student, config)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.train.learning_rate)
    model, optimizer = accelerator.prepare(student, optimizer)

    def learn(loss: Tensor) -> None:
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Learner(student=student, model=model, accelerator=accelerator, learn=learn)


def _inject(student: Student, config: Config) -> None:
    """Put in adapters in float32; B is not zero, as after some steps."""
    lora = config.lora
    for part, targets in find_modules(student, config).items():
        peft = PeftLoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=sorted(targets))
        inject_adapter_in_model(peft, student.parts[part])
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=1e-3)


def noise_step(learner: Learner, batch: Batch) -> Step:
    """Return a step towards the noise that was added, as diffusers' scripts train, on one batch over and over."""
    table = make_alphas_cumprod().to(learner.accelerator.device)

    def step() -> None:
        device = learner.accelerator.device
        conditioning = batch.conditioning.to(device, learner.student.dtype)
        clean = batch.rollout_latents[:, 0, -1].to(device).float()  # (B, C, h, w)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=device)
        noisy = diffuse(clean, noise, alphas_at(table, timesteps))
        with torch.no_grad(), learner.accelerator.autocast():
            control = learner.student.control(conditioning)
        eps = learner.model(noisy, timesteps, conditioning, control)
        learner.learn(functional.mse_loss(eps.float(), noise))

    return step


# With the teacher in the process.


def online_step(
    learner: Learner, teacher: Teacher, inputs: Sequence[RenderedInput], scale: float, *, together: bool
) -> Step:
    """Return a step of latent consistency distillation that encodes its inputs and asks the teacher.

    Args:
        learner: the student.
        teacher: in the same process.
        inputs: of a batch, rendered with their images.
        scale: of the guidance.
        together: call the teacher once for both branches, and not twice as diffusers' script does.

    Source: diffusers' examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py.
    """
    table = make_alphas_cumprod().to(teacher.device)
    images = torch.stack([item.image for item in inputs if item.image is not None])
    uncond = teacher.unconditional()

    def step() -> None:
        t = torch.randint(20, 1000, (len(inputs),)).to(teacher.device)
        a, a_next = alphas_at(table, t), alphas_at(table, t - 20)
        with torch.no_grad():
            latents = teacher.vae.encode(images.to(teacher.device, teacher.dtype)).float()
            conditionings = teacher.encode(inputs)
            z = diffuse(latents, torch.randn_like(latents), a)
            eps = _ask(teacher.denoiser, conditionings, uncond, scale, z, t, together=together)
            z_next = guided_solver_step(z, predict_x0(z, eps, a), a, a_next)
            conditioning = ConditioningBatch.stack(conditionings).to(teacher.device, learner.student.dtype)
            with learner.accelerator.autocast():
                control = learner.student.control(conditioning)
                target_eps = learner.student(z_next, t - 20, conditioning, control).float()
            target = consistency_value(z_next, target_eps, t - 20, a_next)
        value = consistency_value(z, learner.model(z, t, conditioning, control).float(), t, a)
        learner.learn(pseudo_huber(value - target, 1e-3).mean())

    return step


def _ask(
    denoiser: Denoiser,
    conditionings: Sequence[Conditioning],
    uncond: Uncond,
    scale: float,
    z: Tensor,
    t: Tensor,
    *,
    together: bool,
) -> Tensor:
    """Return the teacher's guided eps, (B, C, h, w)."""
    if together:
        return guide(predict_branches(denoiser, conditionings, uncond), scale)(z, t)
    without = [item.without(uncond.to(z.device)) for item in conditionings]
    cond, other = (predict_branches(denoiser, branch, None)(z, t)[0] for branch in (conditionings, without))
    return guided(cond, other, scale)


# Values.


Learnt = tuple[Tensor, dict[str, Tensor]]
"""What the student predicts in a step, and the gradient of each adapter's parameter; float32 on the CPU."""


def gradients(trainer: Trainer, batch: Batch) -> Learnt:
    """Do a step; return its eps and the gradients of the adapters, before they are clipped.

    The adapters are set to the same small numbers first: where B is zero, the gradient of A is too. The loss would
    tell little: beside the targets of made-up records, the eps of made-up weights is small.
    """
    for index, parameter in enumerate(trainer.learner.parameters.values()):
        generator = torch.Generator().manual_seed(index)
        parameter.data.copy_(1e-2 * torch.randn(parameter.shape, generator=generator))
    if trainer.learner.folded is not None:
        trainer.learner.folded.refresh()
    predicted: list[Tensor] = []

    def look(_student: nn.Module, _arguments: object, eps: Tensor) -> None:
        predicted.append(eps.detach().float().cpu())

    found: dict[str, Tensor] = {}
    clip: Callable[..., Any] = trainer.accelerator.clip_grad_norm_

    def keep(*_arguments: object) -> Any:
        found.update(
            {n: p.grad.float().cpu() for n, p in trainer.learner.parameters.items() if p.grad is not None}
        )
        return clip(trainer.learner.parameters.values(), math.inf)

    looking = trainer.student.register_forward_hook(look)
    trainer.accelerator.clip_grad_norm_ = keep  # type: ignore[method-assign]
    try:
        trainer.optimizer_step(iter([batch]))
    finally:
        trainer.accelerator.clip_grad_norm_ = clip  # type: ignore[method-assign]
        looking.remove()
    return predicted[0], found
