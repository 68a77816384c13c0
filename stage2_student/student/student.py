"""The student: the frozen UNet and WriteNet with LoRA adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.anytext2.checkpoint import load_denoiser
from common.anytext2.conditioning import ConditioningBatch
from common.anytext2.denoiser import Denoiser
from common.anytext2.unet import Control
from common.config import Config
from stage2_student.student.lora import Adapted, adapt, find_targets, lora_parameters

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MIXED = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Student(Denoiser):
    """The denoiser with LoRA adapters, once `add_adapters` has put them in."""

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: ConditioningBatch,
        control: Control | None = None,
        *,
        attnx_scale: float = 1.0,
    ) -> Tensor:
        """Predict as `Denoiser.forward` does, for n states of each image that follow each other, (B n, C, h, w).

        WriteNet runs once an image; `control`, if it is given, is of the B images.
        """
        draws = len(noisy_latents) // len(conditioning)
        if draws > 1:
            control = self.control(conditioning) if control is None else control
            control = tuple(residual.repeat_interleave(draws, dim=0) for residual in control)
            mask = conditioning.context_mask
            conditioning = replace(  # the rest is WriteNet's
                conditioning,
                image_context=conditioning.image_context.repeat_interleave(draws, dim=0),
                context_mask=None if mask is None else mask.repeat_interleave(draws, dim=0),
            )
        return super().forward(noisy_latents, timesteps, conditioning, control, attnx_scale=attnx_scale)

    @property
    def adapts_writenet(self) -> bool:
        """Whether WriteNet's result depends on trainable parameters."""
        return any(parameter.requires_grad for parameter in self.writenet.parameters())

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the adapters' parameters as `unet.NAME` and `writenet.NAME`."""
        return {
            f"{part}.{name}": parameter
            for part, model in self.parts.items()
            for name, parameter in lora_parameters(model).items()
        }


def split_parts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Undo the prefixes of `Student.trainable`: tensors by part, then by name within it."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def training_dtype(config: Config) -> torch.dtype:
    """Return the frozen weights' type in training.

    model.dtype; but if that is a half type and train.mixed_precision another one, the latter's, so that autocast
    need not convert every weight at every use.
    """
    dtype = DTYPES[config.model.dtype]
    if dtype == torch.float32:
        return dtype
    return MIXED.get(config.train.mixed_precision, dtype)


def load_base(config: Config, dtype: torch.dtype, device: torch.device | str) -> tuple[Student, Path]:
    """Load the frozen UNet and WriteNet, in eval mode, and nothing else of the checkpoint.

    Returns:
        The student without adapters, and the checkpoint's path.

    Raises:
        DataError: the checkpoint is missing, unreadable, or of another network.
    """
    network = config.load_network()
    checkpoint = config.find_checkpoint()
    base = load_denoiser(network, checkpoint, dtype, device)
    return Student(base.unet, base.writenet), checkpoint


def add_adapters(student: Student, config: Config) -> list[Adapted]:
    """Adapt what the configuration asks for; returns the list of it.

    Raises:
        UsageError: a pattern matches nothing, or a module is matched twice.
    """
    lora = config.lora
    adapted: list[Adapted] = []
    for part, targets in find_modules(student, config).items():
        model = student.parts[part]
        adapted += adapt(model, part, targets, rank=lora.rank, alpha=lora.alpha, seed=config.train.seed)
    return adapted


def find_modules(student: Student, config: Config) -> dict[str, dict[str, str]]:
    """Return what [lora] asks to adapt, by part: the pattern of each module, by name.

    Raises:
        UsageError: a pattern matches nothing, or a module is matched twice.
    """
    lora = config.lora
    found = {"unet": find_targets(student.unet, lora.targets, "lora.targets")}
    if lora.writenet:
        found["writenet"] = find_targets(student.writenet, lora.writenet_targets, "lora.writenet_targets")
    return found
