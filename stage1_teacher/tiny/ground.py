"""Grounds of synthetic scenes: flat colours, gradients and textures, each with a caption that says what it is.

No texture is random in its pixels: beside one, a small network takes noise that is left in a picture for texture.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Color = tuple[int, int, int]

PALETTE: dict[str, Color] = {
    "black": (16, 16, 16),
    "white": (240, 240, 240),
    "red": (214, 36, 36),
    "green": (24, 140, 56),
    "blue": (36, 64, 210),
    "yellow": (244, 216, 40),
    "orange": (244, 132, 24),
    "purple": (128, 40, 168),
    "cyan": (64, 208, 224),
    "pink": (248, 144, 196),
}
"""Colours of text and grounds, by name, RGB 0 to 255."""

BAND = 16
"""Width of a stripe, side of a square, pixels. They start at the image's edge: a caption then says where each is.
Left to chance, a small network could not keep them in order (docs/results.md)."""

KINDS = ("plain", "gradient", "striped", "checked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What lies behind the text."""

    kind: str
    """One of `KINDS`."""
    colors: tuple[str, ...]
    """Names in `PALETTE`: one, or the two ends of a gradient."""
    vertical: bool
    """Gradient from top to bottom, stripes that stand; otherwise left to right, stripes that lie."""

    @property
    def caption(self) -> str:
        """Say ground and style in a few words."""
        if self.kind == "gradient":
            way = "top to bottom" if self.vertical else "left to right"
            article = "an" if self.colors[0] == "orange" else "a"
            return f"{article} {self.colors[0]} to {self.colors[1]} gradient from {way}"
        if self.kind == "striped":
            return (
                f"a striped {self.colors[0]} background, {'vertical' if self.vertical else 'horizontal'} stripes"
            )
        return f"a {self.kind} {self.colors[0]} background"


def draw_ground_plan(random_: random.Random) -> Ground:
    """Choose a ground."""
    kind = random_.choices(KINDS, weights=(0.45, 0.28, 0.14, 0.13))[0]
    names = list(PALETTE)
    first = random_.choice(names)
    if kind != "gradient":
        return Ground(kind=kind, colors=(first,), vertical=random_.random() < 0.5)
    # Neighbours in lightness only: a text of one colour must stand out from both ends.
    near = [name for name in names if name != first and abs(_luma(name) - _luma(first)) < 75]
    second = random_.choice(near) if near else first
    return Ground(kind=kind, colors=(first, second), vertical=random_.random() < 0.5)


def render_ground(ground: Ground, size: int) -> NDArray[np.uint8]:
    """Draw a ground, (size, size, 3) RGB."""
    base = np.asarray(PALETTE[ground.colors[0]], dtype=np.float32)
    image = np.broadcast_to(base, (size, size, 3)).copy()
    if ground.kind == "gradient":
        end = np.asarray(PALETTE[ground.colors[1]], dtype=np.float32)
        ramp = np.linspace(0, 1, size, dtype=np.float32)
        mix = ramp[:, None, None] if ground.vertical else ramp[None, :, None]
        image = base * (1 - mix) + end * mix + np.zeros_like(image)
    elif ground.kind in ("striped", "checked"):
        bands = (np.arange(size) // BAND) % 2
        columns, rows = bands[None, :], bands[:, None]
        pattern = (columns ^ rows) if ground.kind == "checked" else columns if ground.vertical else rows
        image += _shade(ground) * (np.broadcast_to(pattern, (size, size))[..., None] * 2.0 - 1.0)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _shade(ground: Ground) -> float:
    """Half the difference between the two shades of a pattern."""
    return 14.0 if 60 < _luma(ground.colors[0]) < 200 else 12.0


def _luma(name: str) -> float:
    return float(np.dot(PALETTE[name], (0.299, 0.587, 0.114)))
