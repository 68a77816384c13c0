"""The student: the frozen UNet and WriteNet with LoRA adapters, and what conditions it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from common.anytext2.checkpoint import load_unet, load_writenet
from common.anytext2.config import NetworkConfig, load_network_config
from common.anytext2.hints import Hints
from common.anytext2.unet import Control, UNet, pad_contexts
from common.anytext2.writenet import WriteNet
from common.config import Config
from shards.records.batch import Batch
from stage2_student.student.lora import Adapted, adapt, find_targets, lora_parameters

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MIXED = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Described(Protocol):
    """One image's conditioning, never padded: a record, or what the teacher's encoders return."""

    @property
    def image_context(self) -> Tensor:
        """(77 k, c)."""

    @property
    def text_context(self) -> Tensor:
        """(77, c)."""

    @property
    def glyphs(self) -> Tensor:
        """(1, H, W)."""

    @property
    def positions(self) -> Tensor:
        """(1, H, W)."""

    @property
    def masked_latents(self) -> Tensor:
        """(C, h, w)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What a batch of images is to show, as the networks take it."""

    image_context: Tensor
    """Caption encodings, zeros after each, (B, L, c)."""
    context_mask: Tensor | None
    """False where image_context is padding, bool (B, L); None if nothing is."""
    text_context: Tensor
    """Encodings of the text captions, (B, 77, c)."""
    hints: Hints
    """Glyphs, positions and masked latents."""

    @staticmethod
    def of_batch(batch: Batch) -> Conditioning:
        """Take the conditioning of records; the mask is left out if nothing is padded."""
        return Conditioning(
            image_context=batch.image_context,
            context_mask=None if bool(batch.context_mask.all()) else batch.context_mask,
            text_context=batch.text_context,
            hints=batch.hints,
        )

    @staticmethod
    def stack(items: Sequence[Described]) -> Conditioning:
        """Put the conditioning of images of one size side by side; contexts of different length are masked."""
        image_context, mask = pad_contexts([item.image_context for item in items])
        return Conditioning(
            image_context=image_context,
            context_mask=mask,
            text_context=torch.stack([item.text_context for item in items]),
            hints=Hints(
                glyphs=torch.stack([item.glyphs for item in items]),
                positions=torch.stack([item.positions for item in items]),
                masked_latents=torch.stack([item.masked_latents for item in items]),
            ),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """Move to a device and float type."""
        return Conditioning(
            image_context=self.image_context.to(device, dtype),
            context_mask=None if self.context_mask is None else self.context_mask.to(device),
            text_context=self.text_context.to(device, dtype),
            hints=self.hints.to(device, dtype),
        )

    def __len__(self) -> int:
        return len(self.hints)


class Student(nn.Module):
    """UNet and WriteNet in one module, so that distributed training wraps all that is adapted."""

    def __init__(self, unet: UNet, writenet: WriteNet) -> None:
        super().__init__()
        self.unet, self.writenet = unet, writenet

    @property
    def dtype(self) -> torch.dtype:
        """Float type of the frozen weights, and so of what goes in."""
        return self.unet.conv_in.weight.dtype

    @property
    def adapts_writenet(self) -> bool:
        """Whether WriteNet's result depends on trainable parameters."""
        return any(parameter.requires_grad for parameter in self.writenet.parameters())

    def control(self, conditioning: Conditioning) -> Control:
        """Return WriteNet's residuals; they depend on neither z_t nor t."""
        return self.writenet(conditioning.hints, conditioning.text_context)

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        control: Control | None = None,
    ) -> Tensor:
        """Predict the noise, without guidance.

        Args:
            noisy_latents: z_t, (B, C, h, w), any float type.
            timesteps: (B,) int64.
            conditioning: of B samples.
            control: WriteNet's residuals if they are at hand; computed here if not.

        Returns:
            eps, (B, C, h, w), in the network's float type.
        """
        if control is None:
            control = self.control(conditioning)
        return self.unet(
            noisy_latents.to(self.dtype),
            timesteps,
            conditioning.image_context,
            control,
            context_mask=conditioning.context_mask,
        )

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the adapters' parameters as `unet.NAME` and `writenet.NAME`."""
        parts: dict[str, nn.Module] = {"unet": self.unet, "writenet": self.writenet}
        return {
            f"{part}.{name}": parameter
            for part, model in parts.items()
            for name, parameter in lora_parameters(model).items()
        }


def split_parts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Undo the prefixes of `Student.trainable`: tensors by part, then by name within it."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def network_of(config: Config) -> NetworkConfig:
    """Return the sizes of the configured network.

    Raises:
        UsageError: the network file is not one.
        DataError: it is missing.
    """
    name = config.model.network
    return load_network_config(name if name == "sd15" else config.resolve(name, "model.network"))


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
    network = network_of(config)
    checkpoint = config.resolve(config.model.checkpoint, "model.checkpoint")
    unet = load_unet(network, checkpoint, dtype, device)
    writenet = load_writenet(network, checkpoint, dtype, device)
    return Student(unet, writenet), checkpoint


def add_adapters(student: Student, config: Config) -> list[Adapted]:
    """Adapt what the configuration asks for; returns the list of it.

    Raises:
        UsageError: a pattern matches nothing, or a module is matched twice.
    """
    lora = config.lora
    plan = [("unet", student.unet, find_targets(student.unet, lora.targets, "lora.targets"))]
    if lora.writenet:
        found = find_targets(student.writenet, lora.writenet_targets, "lora.writenet_targets")
        plan.append(("writenet", student.writenet, found))
    adapted: list[Adapted] = []
    for part, model, targets in plan:
        adapted += adapt(model, part, targets, rank=lora.rank, alpha=lora.alpha, seed=config.train.seed)
    return adapted
