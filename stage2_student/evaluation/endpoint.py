"""Distance to the teacher's own solve from the same noise: of latents, inside and outside the text, and of images.

The root of the mean square over images is a run's endpoint error; single images are kept as mean squares, so that
any selection of them can be joined. Nothing here knows who sampled, or where a solve comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from common.pictures import Picture

PEAK = 255
"""Range of an image's values, which `psnr` relates its error to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SquareErrors:
    """Of one image's latents: the mean square difference from the solve's."""

    whole: float
    """Over all cells and channels."""
    inside: float | None
    """Over the cells that hold text; None if none does."""
    outside: float | None
    """Over the others; None if all hold text."""


def square_errors(latents: Tensor, solved: Tensor, cells: Tensor) -> list[SquareErrors]:
    """Compare latents with those of the teacher's own solve from the same noise.

    Args:
        latents: (B, C, h, w), of any float type and device.
        solved: likewise; both are compared in float64 on the CPU.
        cells: where there is text, (B, 1, h, w), 1 or 0; see `common.regions.text_cells`.

    Returns:
        Of each of the B images.
    """
    squares = mean_squares(latents, solved)  # (B, h, w)
    inside = cells[:, 0].cpu() > 0  # (B, h, w)
    return [
        SquareErrors(
            whole=float(square.mean()),
            inside=float(square[where].mean()) if where.any() else None,
            outside=float(square[~where].mean()) if (~where).any() else None,
        )
        for square, where in zip(squares, inside, strict=True)
    ]


def mean_squares(latents: Tensor, solved: Tensor) -> Tensor:
    """Return the squared difference of two (B, C, h, w), its mean over channels: (B, h, w) float64 on the CPU."""
    return (latents.detach().cpu().double() - solved.detach().cpu().double()).square().mean(dim=1)


def endpoint_error(latents: Tensor, solved: Tensor) -> float:
    """Return the endpoint error of B images: the root of the mean square of all differences.

    Args:
        latents: (B, C, h, w).
        solved: the teacher's from the same noise, likewise.
    """
    return math.sqrt(float(mean_squares(latents, solved).mean()))


def psnr(picture: Picture, solved: Picture) -> float | None:
    """Return the peak signal-to-noise ratio of two images, dB: 10 log10(255^2 / mean square difference).

    None if they are equal: the ratio would be infinite.

    Args:
        picture: (H, W, 3) uint8: decoded latents, clipped to [-1, 1] and rounded to 0 ... 255 as in an image file.
        solved: the teacher's from the same noise, likewise.
    """
    square = float(np.square(picture.astype(np.float64) - solved.astype(np.float64)).mean())
    return 10 * math.log10(PEAK**2 / square) if square else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StateError:
    """How far a state on the way is from the teacher's at the same timestep."""

    timestep: int
    """Where both lie; `common.ddim.CLEAN` at the end of the solve."""
    square: float
    """Mean square difference over all cells and channels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far one sampled image is from the teacher's own solve from the same noise."""

    latents: SquareErrors
    psnr: float | None
    """Of the decoded images, dB; None if they are equal."""
    way: tuple[StateError, ...] = ()
    """After each step, where the teacher's state there is known."""
