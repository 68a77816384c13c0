"""Grounds of synthetic scenes, each with a caption that says its kind and its colours; and the worlds of scenes.

Of some kinds the caption tells all there is to see. Of the others it tells the palette alone: where spots and
soft shapes lie, how large they are and which way a gradient runs is left to chance. So a teacher cannot draw them
in one step, which can only give the mean of all that may be there. They are coarse: fine ones are beyond a small
network. Clouds, a texture that a small network can draw, lie over all grounds of that world, and a fine grain over
whole images, as in photographs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from common.seeding import derive_seed

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

TOLD_KINDS = ("plain", "gradient", "striped", "checked")
"""Those of which the caption says everything."""
CHANCE_KINDS = ("spots", "soft", "turned")
"""Those of which it says kind and colours alone; "turned" is a gradient in any direction."""
KINDS = TOLD_KINDS + CHANCE_KINDS
SPOTS, SPOT_RADII = (2, 5), (0.08, 0.2)
"""How many spots a ground has, least and most, and their radii in sides of the image."""
SOFT_SHAPES, SOFT_RADII = (1, 3), (0.22, 0.4)
"""The same of soft shapes; the radius is where nothing is left of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What scenes are drawn from."""

    shares: tuple[float, ...]
    """Of the grounds, by `KINDS`."""
    untold_share: float
    """Of the lines that the glyph map shows, whose font and slant are left to chance: the annotation does not name
    the font, and the letters may lean."""
    clouds: float = 0.0
    """Standard deviation of the clouds that lie over a ground, of 255 levels."""
    grain: float = 0.0
    """The same of the grain of the whole image."""


TOLD = World(shares=(0.45, 0.28, 0.14, 0.13, 0, 0, 0), untold_share=0)
"""All that can be seen is told, by captions and annotations."""
CHANCE = World(shares=(0.12, 0.08, 0.04, 0.04, 0.55, 0.1, 0.07), untold_share=0.12, clouds=10.0, grain=3.0)
"""Much is left to chance."""
CLOUD_SIZE, GRAIN_SIZE = 4.0, 0.8
"""Standard deviation of the Gaussian that makes clouds, and grain, of white noise, pixels. A grain of 3 levels is
0.07 of the latents' standard deviation: less, and a small network leaves more noise than that in a picture."""
WORLDS = {"told": TOLD, "chance": CHANCE}
"""By the names that the commands know them by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What lies behind the text."""

    kind: str
    """One of `KINDS`."""
    colors: tuple[str, ...]
    """Names in `PALETTE`: one, the two ends of a gradient, or the ground's and its shapes'."""
    vertical: bool
    """Gradient from top to bottom, stripes that stand; otherwise left to right, stripes that lie."""
    shapes: tuple[tuple[float, float, float], ...] = ()
    """Spots or soft shapes: centre (x, y) and radius, in sides of the image. No caption says them."""
    angle: float = 0.0
    """Degrees that a turned gradient runs in, clockwise from left to right. No caption says it."""

    @property
    def untold_lumas(self) -> tuple[float, ...]:
        """Lumas that may lie anywhere: those of a ground whose shapes or direction no caption tells.

        Whoever draws the ground from its caption puts its shapes elsewhere, and a line must be readable there too.
        """
        return tuple(map(_luma, self.colors)) if self.kind in CHANCE_KINDS else ()

    @property
    def caption(self) -> str:
        """Say ground and style in a few words."""
        article = "an" if self.colors[0] == "orange" else "a"
        if self.kind in ("gradient", "turned"):
            way = f" from {'top to bottom' if self.vertical else 'left to right'}"
            return f"{article} {self.colors[0]} to {self.colors[1]} gradient{way * (self.kind == 'gradient')}"
        if self.kind in ("spots", "soft"):
            shapes = f"{self.colors[1]} spots" if self.kind == "spots" else f"soft {self.colors[1]} shapes"
            return f"{article} {self.colors[0]} background with {shapes}"
        if self.kind == "striped":
            return (
                f"a striped {self.colors[0]} background, {'vertical' if self.vertical else 'horizontal'} stripes"
            )
        return f"a {self.kind} {self.colors[0]} background"


def draw_ground_plan(random_: random.Random, world: World = TOLD) -> Ground:
    """Choose a ground."""
    kind = random_.choices(KINDS, weights=world.shares)[0]
    first = random_.choice(list(PALETTE))
    if kind in TOLD_KINDS:
        colors = (first, _second(random_, first, _neighbours(first))) if kind == "gradient" else (first,)
        return Ground(kind=kind, colors=colors, vertical=random_.random() < 0.5)
    if kind == "turned":
        colors = (first, _second(random_, first, _neighbours(first)))
        return Ground(kind=kind, colors=colors, vertical=False, angle=random_.uniform(0, 360))
    colors = (first, _second(random_, first, _companions(first)))
    least_most, radii = (SPOTS, SPOT_RADII) if kind == "spots" else (SOFT_SHAPES, SOFT_RADII)
    shapes = tuple(
        (random_.random(), random_.random(), random_.uniform(*radii)) for _ in range(random_.randint(*least_most))
    )
    return Ground(kind=kind, colors=colors, vertical=False, shapes=shapes)


def _second(random_: random.Random, first: str, fitting: Sequence[str]) -> str:
    return random_.choice(fitting) if fitting else first


def _neighbours(first: str) -> list[str]:
    """Return colours of about the same lightness: a text of one colour must stand out from both ends."""
    return [name for name in PALETTE if name != first and abs(_luma(name) - _luma(first)) < 75]


def _companions(first: str) -> list[str]:
    """Return colours of shapes that leave one of black and white readable across their edges."""
    free = 85.0  # as scene.MIN_CONTRAST
    darkest, brightest = _luma("black"), _luma("white")

    def readable(name: str) -> bool:
        low, high = sorted((_luma(name), _luma(first)))
        return low - free > darkest or high + free < brightest

    return [name for name in PALETTE if name != first and readable(name)]


def render_ground(ground: Ground, size: int) -> NDArray[np.uint8]:
    """Draw a ground, (size, size, 3) RGB."""
    base = np.asarray(PALETTE[ground.colors[0]], dtype=np.float32)
    image = np.broadcast_to(base, (size, size, 3)).copy()
    if len(ground.colors) > 1:
        end = np.asarray(PALETTE[ground.colors[1]], dtype=np.float32)
        mix = _mix(ground, size)[..., None]
        image = base * (1 - mix) + end * mix
    elif ground.kind in ("striped", "checked"):
        bands = (np.arange(size) // BAND) % 2
        columns, rows = bands[None, :], bands[:, None]
        pattern = (columns ^ rows) if ground.kind == "checked" else columns if ground.vertical else rows
        image += _shade(ground) * (np.broadcast_to(pattern, (size, size))[..., None] * 2.0 - 1.0)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def smooth_noise(size: int, spread: float, deviation: float, *seed: str | int) -> NDArray[np.float32]:
    """Draw noise of one lightness for all three colours, (size, size, 1).

    Args:
        size: side, pixels.
        spread: standard deviation of the Gaussian that smooths it, pixels.
        deviation: of the result, in levels of 255.
        *seed: its key.
    """
    white = np.random.default_rng(derive_seed(*seed)).standard_normal((size, size)).astype(np.float32)
    noise = cv2.GaussianBlur(white, (0, 0), spread, borderType=cv2.BORDER_REFLECT)
    return np.asarray(noise / noise.std() * deviation, dtype=np.float32)[..., None]


def _mix(ground: Ground, size: int) -> NDArray[np.float32]:
    """Return how much of the second colour each pixel has, (size, size) in 0 to 1."""
    if ground.kind == "gradient":
        ramp = np.linspace(0, 1, size, dtype=np.float32)
        return np.broadcast_to(ramp[:, None] if ground.vertical else ramp, (size, size))
    place = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = place[None, :], place[:, None]
    if ground.kind == "turned":
        angle = math.radians(ground.angle)
        along = (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)
        return (along / (abs(math.cos(angle)) + abs(math.sin(angle))) + 0.5).astype(np.float32)
    left = np.ones((size, size), dtype=np.float32)
    for center_x, center_y, radius in ground.shapes:
        distance = np.hypot(x - center_x, y - center_y)
        if ground.kind == "spots":  # an edge of one pixel
            covered = np.clip((radius - distance) * size + 0.5, 0, 1)
        else:
            covered = 0.5 + 0.5 * np.cos(np.pi * np.clip(distance / radius, 0, 1))
        left *= 1 - covered
    return (1 - left).astype(np.float32)


def _shade(ground: Ground) -> float:
    """Half the difference between the two shades of a pattern."""
    return 14.0 if 60 < _luma(ground.colors[0]) < 200 else 12.0


def _luma(name: str) -> float:
    return float(np.dot(PALETTE[name], (0.299, 0.587, 0.114)))
