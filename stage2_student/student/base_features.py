"""What the frozen base sees in latents: features of its down and middle blocks, with the adapters off.

No second network is kept: for the time of a call PEFT's B count as zero, or folded weights as what they were.
Gradients pass through it to the latents and to nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.anytext2.unet import UNet
from stage2_student.student.folding import FoldedAdapters
from stage2_student.student.lora import ADAPTER_NAME, adapted_layers, lora_pair

REACHED = ("conv_in.", "time_embedding.", "down_blocks.", "mid_block.")
"""Starts of the names of what `UNet.features` runs through."""


class _Features(nn.Module):
    """The features as a module of their own, whose parameters can be stood in for."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor, mask: Tensor | None) -> list[Tensor]:
        return self.unet.features(latents, timesteps, context, context_mask=mask)


class BaseFeatures:
    """The base's features of latents; see `UNet.features`."""

    def __init__(self, unet: UNet, folded: FoldedAdapters | None = None) -> None:
        """Find what stands in for the adapted weights; if they are folded, W once more in the arithmetic's type.

        Args:
            unet: with adapters, or folded ones.
            folded: these, if they are.
        """
        self._module = _Features(unet)
        stand_ins = _without_adapters(unet) if folded is None else _unfolded(unet, folded)
        self._stand_ins = {f"unet.{name}": tensor for name, tensor in stand_ins.items()}

    def __call__(
        self, latents: Tensor, timesteps: Tensor, image_context: Tensor, mask: Tensor | None
    ) -> list[Tensor]:
        """Return the features of each level; arguments as of `UNet.features`."""
        with _all_kept(self._module):
            found: list[Tensor] = functional_call(
                self._module, self._stand_ins, (latents, timesteps, image_context, mask)
            )
        return found


def _without_adapters(unet: UNet) -> dict[str, Tensor]:
    """Return B as zeros, and A without a gradient."""
    found: dict[str, Tensor] = {}
    for name, layer in adapted_layers(unet).items():
        if name.startswith(REACHED):
            a, b = lora_pair(layer)
            found[f"{name}.lora_A.{ADAPTER_NAME}.weight"] = a.detach()
            found[f"{name}.lora_B.{ADAPTER_NAME}.weight"] = torch.zeros_like(b, requires_grad=False)
    return found


def _unfolded(unet: UNet, folded: FoldedAdapters) -> dict[str, Tensor]:
    """Return W of every folded layer."""
    reached = ((name, weight) for name, weight in unet.named_parameters() if name.startswith(REACHED))
    found = {name: folded.base_weight(weight) for name, weight in reached}
    return {name: weight for name, weight in found.items() if weight is not None}


@contextmanager
def _all_kept(module: nn.Module) -> Iterator[None]:
    """Keep all activations: computed again in the backward pass, they would be the student's."""
    parts = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in parts:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True  # type: ignore[assignment]
