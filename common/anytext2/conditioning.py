"""What an image is to show, as the networks take it: one image's, a batch's, the unconditional branch's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from common.tensors import Tensors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Uncond(Tensors):
    """The contexts of the unconditional branch of guidance, the same for every image."""

    image_context: Tensor
    """The negative prompt's, (77 k, c)."""
    text_context: Tensor
    """An empty text caption's, (77, c)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conditioning(Tensors):
    """One image's, from the teacher's encoders or from a record."""

    image_context: Tensor
    """(77 k, c), never padded."""
    text_context: Tensor
    """(77, c)."""
    glyphs: Tensor
    """(1, H, W), 0 or 1."""
    positions: Tensor
    """(1, H, W): how many lines cover each pixel."""
    masked_latents: Tensor
    """(C, h, w), VAE-scaled."""

    def without(self, uncond: Uncond) -> Conditioning:
        """Return the unconditional branch's: the same hints with the unconditional contexts."""
        return replace(self, image_context=uncond.image_context, text_context=uncond.text_context)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hints(Tensors):
    """What WriteNet sees of a batch besides the text context, all of one float type and device."""

    glyphs: Tensor
    """Union of the rendered lines, (B, 1, H, W), 0 or 1."""
    positions: Tensor
    """Sum of the lines' position masks, (B, 1, H, W): 0, 1, 2 ..."""
    masked_latents: Tensor
    """VAE latents of the masked image, (B, C, h, w)."""

    def __len__(self) -> int:
        return int(self.masked_latents.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConditioningBatch(Tensors):
    """That of B images of one size, side by side."""

    image_context: Tensor
    """Caption encodings, zeros after each, (B, L, c), L the longest's 77 k."""
    context_mask: Tensor | None
    """False where image_context is padding, bool (B, L); None if nothing is."""
    text_context: Tensor
    """Encodings of the text captions, (B, 77, c)."""
    hints: Hints
    """Glyphs, positions and masked latents."""

    @staticmethod
    def stack(items: Sequence[Conditioning]) -> ConditioningBatch:
        """Put images side by side; contexts of different length are padded and masked."""
        image_context, mask = pad_contexts([item.image_context for item in items])
        return ConditioningBatch(
            image_context=image_context,
            context_mask=mask,
            text_context=torch.stack([item.text_context for item in items]),
            hints=Hints(
                glyphs=torch.stack([item.glyphs for item in items]),
                positions=torch.stack([item.positions for item in items]),
                masked_latents=torch.stack([item.masked_latents for item in items]),
            ),
        )

    def __len__(self) -> int:
        return len(self.hints)


def pad_contexts(contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack image contexts of different lengths into a batch.

    Args:
        contexts: B tensors (L_i, c).

    Returns:
        The contexts with zeros after each, (B, max L, c), and the bool mask (B, max L) that hides the zeros;
        None in its place if all lengths are equal.
    """
    lengths = torch.tensor([context.shape[0] for context in contexts])
    padded = nn.utils.rnn.pad_sequence(list(contexts), batch_first=True)  # (B, max L, c)
    if bool((lengths == padded.shape[1]).all()):
        return padded, None
    mask = torch.arange(padded.shape[1])[None] < lengths[:, None]  # (B, max L)
    return padded, mask.to(padded.device)
