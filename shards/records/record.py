"""One training sample: what the teacher was given and what it did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.anytext2.conditioning import Conditioning, Uncond
from common.errors import DataError
from common.grids import NUM_TRAIN_TIMESTEPS
from shards.records.meta import SampleMeta
from shards.records.png import MAX_SIDE
from shards.records.tensor_file import is_finite

CHUNK_TOKENS = 77
"""Of a chunk of a CLIP context, with its start and end tokens; an image context has one or more."""


class NonFiniteError(DataError):
    """A tensor holds NaN or infinity: the teacher is wrong, not the input, so it is no failed input."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """A record as it is stored. Tensors are on the CPU and have exactly these types.

    c is the context's width, C the latent channels, (h, w) the latent size, R rollouts, S called states.

    Raises:
        DataError: a field's type, shape or value breaks the schema; the message names the field.
        NonFiniteError: a field holds NaN or infinity.
    """

    meta: SampleMeta
    image_context: Tensor
    """(77 k, c) float16: the UNet's context, never padded."""
    text_context: Tensor
    """(77, c) float16: WriteNet's context."""
    masked_latents: Tensor
    """(C, h, w) float16, VAE-scaled."""
    rollout_latents: Tensor
    """(R, S + 1, C, h, w) float16: states at which the network was called, then the solved x0.

    Of source "student": the student's own state at the start of its first phase, the teacher's at that phase's
    end, and so on, phase by phase. S = 2 M - 1; the last is where the teacher ends from the student's last state.
    """
    rollout_timesteps: Tensor
    """(S,) int64 in 0..999: where it was called; falling if the source is "rollout". Of source "student" t_1, t_2,
    t_2, ... t_M, t_M: what ends a phase and what starts the next one have the same t."""
    glyphs: Tensor
    """(1, H, W) uint8, 0 or 1."""
    positions: Tensor
    """(1, H, W) uint8: how many lines cover each pixel."""
    x0_cond: Tensor | None = None
    """(R, S, C, h, w) float16: the teacher's one-step prediction at each state with the condition, or None."""
    x0_uncond: Tensor | None = None
    """Likewise without the condition; present exactly if `x0_cond` is."""

    def __post_init__(self) -> None:
        where = f"record {self.meta.input_id!r}"
        _check_contexts(self, where)
        _check_masks(self, where)
        _check_latents(self, where)
        for name in _FLOATS:
            value = getattr(self, name)
            if value is not None and not _is_finite(value):
                raise NonFiniteError(
                    f"{where}: {name} holds NaN or infinity in float16, expected finite values; "
                    "check the teacher's weights and precision"
                )

    @property
    def num_rollouts(self) -> int:
        """Rollouts of the input, R."""
        return int(self.rollout_latents.shape[0])

    @property
    def conditioning(self) -> Conditioning:
        """What the teacher was given, as it is stored."""
        return Conditioning(
            image_context=self.image_context,
            text_context=self.text_context,
            glyphs=self.glyphs,
            positions=self.positions,
            masked_latents=self.masked_latents,
        )


def check_uncond(uncond: Uncond) -> Uncond:
    """Return unconditional contexts, one float16 pair for a whole set, if they can be stored.

    Raises:
        DataError: a field's type, shape or value breaks the schema.
        NonFiniteError: a field holds NaN or infinity.
    """
    _check_contexts(uncond, "unconditional contexts")
    for name in ("image_context", "text_context"):
        if not _is_finite(getattr(uncond, name)):
            raise NonFiniteError(f"unconditional contexts: {name} holds NaN or infinity in float16")
    return uncond


_FLOATS = ("image_context", "text_context", "masked_latents", "rollout_latents", "x0_cond", "x0_uncond")


def _check_contexts(value: Record | Uncond, where: str) -> None:
    width = (
        value.text_context.shape[-1] if isinstance(value.text_context, Tensor) and value.text_context.ndim else 0
    )
    _check(value.text_context, "text_context", torch.float16, (CHUNK_TOKENS, width), where, "(77, c)")
    tokens = value.image_context.shape[0] if _has_rank(value.image_context, 2) else 0
    if tokens < CHUNK_TOKENS or tokens % CHUNK_TOKENS:
        tokens = CHUNK_TOKENS
    _check(
        value.image_context,
        "image_context",
        torch.float16,
        (tokens, width),
        where,
        "(77 k, c) with the c of text_context",
    )


def _check_masks(record: Record, where: str) -> None:
    shape = (1, *record.meta.size)
    for name in ("glyphs", "positions"):
        _check(getattr(record, name), name, torch.uint8, shape, where, "(1, H, W) with the record's size")
    if max(shape) > MAX_SIDE:
        raise DataError(f"{where}: size is {record.meta.size}, expected at most {MAX_SIDE} pixels a side")
    if int(record.glyphs.max()) > 1:
        raise DataError(f"{where}: glyphs has values up to {int(record.glyphs.max())}, expected 0 and 1")


def _check_latents(record: Record, where: str) -> None:
    timesteps = record.rollout_timesteps
    steps = timesteps.shape[0] if _has_rank(timesteps, 1) else 0
    _check(timesteps, "rollout_timesteps", torch.int64, (max(steps, 1),), where, "(S,)")
    if int(timesteps.min()) < 0 or int(timesteps.max()) >= NUM_TRAIN_TIMESTEPS:
        raise DataError(f"{where}: rollout_timesteps is {timesteps.tolist()}, expected values in 0..999")
    if record.meta.source == "rollout" and bool((timesteps.diff() >= 0).any()):
        raise DataError(f"{where}: rollout_timesteps is {timesteps.tolist()}, expected falling values")
    if record.meta.source == "student":
        starts, ends = timesteps[::2], timesteps[1::2]
        if steps % 2 == 0 or not torch.equal(starts[1:], ends) or bool((starts.diff() >= 0).any()):
            raise DataError(
                f"{where}: rollout_timesteps is {timesteps.tolist()}, expected t of each phase's start and end in"
                " turn, falling"
            )
    masked = record.masked_latents
    latent = tuple(masked.shape) if _has_rank(masked, 3) else (0, 0, 0)
    _check(masked, "masked_latents", torch.float16, latent, where, "(C, h, w)")
    height, width = record.meta.size
    if height % latent[1] or width % latent[2] or height // latent[1] != width // latent[2]:
        raise DataError(
            f"{where}: masked_latents has shape {latent}, expected an image of {height}x{width} divided by one "
            "stride; was it encoded at another size?"
        )
    rollouts = len(record.meta.seeds)
    shape = (rollouts, steps + 1, *latent)
    _check(record.rollout_latents, "rollout_latents", torch.float16, shape, where, "(R, S + 1, C, h, w)")
    if (record.x0_cond is None) != (record.x0_uncond is None):
        missing = "x0_cond" if record.x0_cond is None else "x0_uncond"
        raise DataError(f"{where}: {missing} is missing, expected both or neither of x0_cond and x0_uncond")
    for name, value in (("x0_cond", record.x0_cond), ("x0_uncond", record.x0_uncond)):
        if value is not None:
            _check(value, name, torch.float16, (rollouts, steps, *latent), where, "(R, S, C, h, w)")


def _has_rank(value: object, rank: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == rank


def _check(value: object, name: str, dtype: torch.dtype, shape: tuple[int, ...], where: str, legend: str) -> None:
    if not isinstance(value, Tensor):
        raise DataError(f"{where}: {name} is a {type(value).__name__}, expected a tensor {legend}")
    if value.device.type != "cpu":
        raise DataError(f"{where}: {name} is on {value.device}, expected the CPU; call .cpu()")
    if value.dtype != dtype:
        raise DataError(f"{where}: {name} has dtype {value.dtype}, expected {dtype}")
    if tuple(value.shape) != shape or value.numel() == 0:
        raise DataError(f"{where}: {name} has shape {tuple(value.shape)}, expected {legend} = {shape}, not empty")


def _is_finite(value: Tensor) -> bool:
    return is_finite(value.detach().contiguous().numpy())
