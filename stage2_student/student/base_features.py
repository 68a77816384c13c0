"""What the frozen base sees in latents: features of its down and middle blocks, with the adapters off.

No second network is kept: the adapters' B count as zero, or the folded weights as what they were, for the time of
a call. Gradients pass through it to the latents and to nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.anytext2.unet import UNet
from stage2_student.student.folding import FoldedAdapters
from stage2_student.student.lora import ADAPTER_NAME, lora_parameters


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
        """Find what stands in for the adapted weights.

        Args:
            unet: with adapters, or folded ones.
            folded: these, if they are.
        """
        self._module = _Features(unet)
        self._zeros = {
            _peft_name(name): torch.zeros_like(p, requires_grad=False)
            for name, p in (lora_parameters(unet) if folded is None else {}).items()
            if name.endswith(".lora_B.weight")
        }
        self._folded = folded
        self._names = {id(parameter): name for name, parameter in self._module.named_parameters()}

    def __call__(
        self, latents: Tensor, timesteps: Tensor, image_context: Tensor, mask: Tensor | None
    ) -> list[Tensor]:
        """Return the features of each level; arguments as of `UNet.features`."""
        with _all_kept(self._module):
            found: list[Tensor] = functional_call(
                self._module, self._stand_ins(), (latents, timesteps, image_context, mask)
            )
        return found

    def _stand_ins(self) -> dict[str, Tensor]:
        if self._folded is None:
            return self._zeros
        weights = self._folded.base_weights()
        return {name: weights[key] for key, name in self._names.items() if key in weights}


def _peft_name(name: str) -> str:
    """Return the name in `_Features` of a parameter that `lora_parameters` names."""
    return f"unet.{name.removesuffix('.weight')}.{ADAPTER_NAME}.weight"


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
