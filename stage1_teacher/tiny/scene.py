"""One synthetic scene: a coloured ground with one to three lines of text, as an image and an AnyWord annotation.

Most lines name their font, and glyph maps are drawn in it, by the rule that the text is fitted to its polygon
with: letters of the image look as the glyph map has them and lie where it has them. With all fonts left to chance,
a small network drew strokes of one letter in different weights (docs/results.md). In the world `CHANCE` font and
slant of a small share of the lines are not told.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.Image import Resampling

from common.seeding import rng
from stage1_teacher.inputs.fonts import load_font
from stage1_teacher.rendering import lines as drawing
from stage1_teacher.tiny.ground import (
    CLOUD_SIZE,
    GRAIN_SIZE,
    PALETTE,
    TOLD,
    Ground,
    World,
    draw_ground_plan,
    render_ground,
    smooth_noise,
)

FONT_FOLDER = Path(__file__).resolve().parents[2] / "models" / "fonts"
FONTS = {
    "DejaVuSans.ttf": 0.35,
    "DejaVuSans-Bold.ttf": 0.25,
    "Roboto-Bold.ttf": 0.16,
    "SourceSansPro-Bold.otf": 0.16,
    "SourceSerifPro-Bold.otf": 0.08,
}
"""Font files, and their shares of the lines. An annotation names the file without its extension, as the table
[inputs.fonts] of configs/tiny.toml does."""
CAPITALS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
SMALL = "abdefghkmnpqrtuy"
DIGITS = "23456789"
"""Without the letters and digits that look alike in some font (0 O o, 1 I l i j, c C, s S ...): a reader that sees
one line of a random text could not tell them apart, and its score would measure that."""
LENGTHS = (11, 12, 18, 20, 18, 12, 9, 6)
"""Weights of lines of one, two ... eight letters."""
SINGLE_LETTERS = (100, 0, 0, 0, 0, 0, 0, 0)
UNMAPPED_SHARE = 0.55
"""Of the single letters, that the glyph map does not show: they are why a teacher listens to the recognizer's
features of a line. Where the map shows a letter, they say nothing more (docs/results.md)."""
UNTOLD_FONT = "DejaVuSans.ttf"
"""Draws, upright, the glyph map of lines that name no font, as inputs.font of configs/tiny.toml has it."""
MAX_LEAN = 0.2
"""How far the letters of such a line lean either way at most, pixels to the side per pixel of height."""
MIN_HEIGHT = 18.0
"""Least height of a line's polygon, pixels; its capitals are then 12 px tall."""
MARGIN = 0.12
"""Ground left and right of the letters, in heights of the polygon; less where the glyph map would put spaces in,
more around a single narrow letter."""
MIN_CONTRAST = 85.0
"""Least difference of luma (0 to 255) between a line and the ground under it: an OCR must read it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of text and where it stands."""

    text: str
    polygon: tuple[tuple[int, int], ...]
    """Four corners, pixels, clockwise from the top left of the text."""
    color: tuple[int, int, int]
    font: str
    """File in `FONT_FOLDER`."""
    in_glyph_map: bool = True
    told: bool = True
    """Whether the annotation names the font. If not, `lean` may be other than 0."""
    lean: float = 0.0
    """Of the letters, to the right, pixels to the side per pixel of height."""

    @property
    def map_font(self) -> str:
        """Name the font of the line's glyph map."""
        return self.font if self.told else UNTOLD_FONT


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything that is needed to draw an image again."""

    ground: Ground
    lines: tuple[Line, ...]
    size: int
    seed: tuple[str | int, ...]
    """Key of the draws that made it; `recolor` goes on from it."""
    world: World = TOLD
    """Where another ground comes from."""

    @property
    def caption(self) -> str:
        """What the image shows, without its text and the text's colour."""
        return self.ground.caption

    def annotation(self, img_name: str) -> dict[str, object]:
        """Return the scene as an entry of an AnyWord json file (v1.2b: with colours), with the fonts it tells."""
        lines = [
            {
                "polygon": [list(point) for point in line.polygon],
                "text": line.text,
                "language": "Latin",
                "valid": True,
                "color": list(line.color),
                **({"font": Path(line.font).stem} if line.told else {}),
                **({} if line.in_glyph_map else {"glyph_map": False}),
            }
            for line in self.lines
        ]
        return {"img_name": img_name, "caption": self.caption, "annotations": lines}


def draw_scene_plan(
    *seed: str | int, size: int = 96, lengths: Sequence[int] = LENGTHS, world: World = TOLD
) -> Scene:
    """Draw a scene's content from a keyed seed.

    Args:
        seed: parts of the key, e.g. a seed and an index.
        size: side of the square image, pixels.
        lengths: weights of lines of one, two ... eight letters.
        world: what it is drawn from.
    """
    random_ = rng("scene", *seed)
    for _ in range(10):  # there are grounds under which no colour of the palette can be read
        ground = draw_ground_plan(random_, world)
        plan = render_ground(ground, size)
        for _ in range(100):
            lines = _place_lines(random_, plan, size, lengths, world, ground.untold_lumas)
            if lines:
                return Scene(ground=ground, lines=lines, size=size, seed=seed, world=world)
    raise AssertionError(f"no line fits a scene of {size} px, seed {seed}")


def recolor(scene: Scene, variant: int) -> Scene:
    """Return the same texts at the same places on another ground and in other colours."""
    for attempt in range(100):
        seed = (*scene.seed, "recolor", variant, attempt)
        random_ = rng("scene", *seed)
        ground = draw_ground_plan(random_, scene.world)
        plan = render_ground(ground, scene.size)
        anywhere = ground.untold_lumas
        colors = [_readable_color(random_, plan, np.array(line.polygon), anywhere) for line in scene.lines]
        if None not in colors:
            lines = [replace(line, color=color) for line, color in zip(scene.lines, colors, strict=True) if color]
            return replace(scene, ground=ground, lines=tuple(lines), seed=seed)
    return scene


def render_scene(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene's image, (size, size, 3) RGB."""
    image = render_ground(scene.ground, scene.size).astype(np.float32)
    world = scene.world
    if world.clouds:
        image += smooth_noise(scene.size, CLOUD_SIZE, world.clouds, "clouds", *scene.seed)
    for line in scene.lines:
        mask = text_mask(line, scene.size)[..., None]
        image = image * (1 - mask) + np.asarray(line.color, dtype=np.float32) * mask
    if world.grain:
        image += smooth_noise(scene.size, GRAIN_SIZE, world.grain, "grain", *scene.seed)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def text_mask(line: Line, size: int) -> NDArray[np.float32]:
    """Coverage of a line's letters, (size, size) in 0 to 1, anti-aliased: of a told line, what the map traces."""
    polygon = np.asarray(line.polygon, dtype=np.float32)
    font = FONT_FOLDER / line.font
    coverage = drawing.render_coverage(line.text, polygon, font, (size, size), resample=Resampling.BICUBIC)
    return _lean(coverage, polygon, line.lean) if line.lean else coverage


def _lean(coverage: NDArray[np.float32], polygon: NDArray[np.float32], lean: float) -> NDArray[np.float32]:
    """Shift a line's letters along it by how far they are above its middle."""
    center, along = polygon.mean(0), polygon[1] - polygon[0]
    along = along / np.linalg.norm(along)
    above = np.array([along[1], -along[0]])
    # Where each pixel comes from: it went `lean` times its height above the middle along the line.
    back = np.eye(2) - lean * np.outer(along, above)
    matrix = np.hstack([back, (center - back @ center)[:, None]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(coverage, matrix, coverage.shape[::-1], flags=flags)


def _place_lines(
    random_: random.Random,
    ground: NDArray[np.uint8],
    size: int,
    lengths: Sequence[int],
    world: World,
    anywhere: Sequence[float],
) -> tuple[Line, ...]:
    count = random_.choices((1, 2, 3), weights=(0.45, 0.38, 0.17))[0]
    cuts = sorted(random_.uniform(-0.08, 0.08) for _ in range(count - 1))
    bands = [0.0, *((i + 1) / count + cut for i, cut in enumerate(cuts)), 1.0]
    lines = []
    for top, bottom in itertools.pairwise(bands):
        line = _place_line(random_, ground, size, top * size, bottom * size, lengths, world, anywhere)
        if line is None:
            return ()
        lines.append(line)
    return tuple(lines)


def _place_line(
    random_: random.Random,
    ground: NDArray[np.uint8],
    size: int,
    top: float,
    bottom: float,
    lengths: Sequence[int],
    world: World,
    anywhere: Sequence[float],
) -> Line | None:
    length = random_.choices(range(1, 9), weights=lengths)[0]
    text = _draw_text(random_, length)
    font = random_.choices(list(FONTS), weights=list(FONTS.values()))[0]
    angle = random_.uniform(-8, 8) if random_.random() < 0.35 else 0.0
    slope = abs(np.sin(np.deg2rad(angle)))
    measure = load_font(FONT_FOLDER / font, 60)
    left, _, right, _ = measure.getbbox(text)
    # Some ground around the letters, but no room for spaces between them: the glyph map would put them in.
    # And never higher than wide: that would mean text from top to bottom.
    room = 2 * MARGIN
    if length > 1:
        room = min(room, 0.8 * (length - 1) * measure.getlength(" ") / 60)
    aspect = max((right - left) / 60 + room, 1.05)
    if aspect < 1.3:
        angle = slope = 0.0
    tallest = min((bottom - top - 2) / (1 + slope * aspect), (size - 2) / (aspect + slope), 42)
    if tallest < MIN_HEIGHT:
        return None
    height = math.floor(random_.uniform(max(MIN_HEIGHT, 0.7 * tallest), tallest))
    width = math.ceil(height * aspect)
    half_w, half_h = (width + slope * height) / 2, (height + slope * width) / 2
    center = np.array(
        [
            random_.uniform(half_w, max(half_w, size - 1 - half_w)),
            random_.uniform(top + half_h, max(top + half_h, bottom - 1 - half_h)),
        ]
    )
    if angle == 0.0:  # whole pixels, so that rounding does not cost a line its size
        center = np.floor(center - np.array([width, height]) / 2) + np.array([width, height]) / 2
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.array([width / 2, height / 2])
    turned = corners @ np.array([[cos, sin], [-sin, cos]]) + center
    polygon = np.rint(np.clip(turned, 0, size - 1)).astype(int)
    color = _readable_color(random_, ground, polygon, anywhere)
    if color is None or not _fits_unspread(text, FONT_FOLDER / font, polygon):
        return None
    in_glyph_map = length > 1 or random_.random() >= UNMAPPED_SHARE
    untold = in_glyph_map and world.untold_share > 0 and random_.random() < world.untold_share
    untold = untold and _fits_unspread(text, FONT_FOLDER / UNTOLD_FONT, polygon)
    return Line(
        text=text,
        polygon=tuple((int(x), int(y)) for x, y in polygon),
        color=color,
        font=font,
        in_glyph_map=in_glyph_map,
        told=not untold,
        lean=random_.uniform(-MAX_LEAN, MAX_LEAN) if untold else 0.0,
    )


def _fits_unspread(text: str, font: Path, polygon: NDArray[np.int_]) -> bool:
    """Whether the glyph map holds the text, without spaces between its letters: a reader would see them too."""
    box = drawing.fit_box(polygon.astype(np.float32))
    sized = drawing.largest_font(text, font, box)
    return sized is not None and drawing.spread(text, sized, box) == text


def _draw_text(random_: random.Random, length: int) -> str:
    style = random_.choices(("sign", "word", "name", "number"), weights=(0.45, 0.2, 0.2, 0.15))[0]
    if style == "word":
        return "".join(random_.choices(SMALL, k=length))
    if style == "name":
        return random_.choice(CAPITALS) + "".join(random_.choices(SMALL, k=length - 1))
    return "".join(random_.choices(CAPITALS * 2 + DIGITS if style == "sign" else DIGITS, k=length))


def _readable_color(
    random_: random.Random,
    ground: NDArray[np.uint8],
    polygon: NDArray[np.int_],
    anywhere: Sequence[float],
) -> tuple[int, int, int] | None:
    """Choose a colour that can be read on what lies under a line, and on lumas that may come to lie there."""
    (left, top), (right, bottom) = polygon.min(0), polygon.max(0)
    under = ground[top : bottom + 1, left : right + 1].reshape(-1, 3) @ np.array([0.299, 0.587, 0.114])
    low, high = np.percentile(under, (2, 98))
    low, high = min([low, *anywhere]), max([high, *anywhere])
    fitting = []
    for color in PALETTE.values():
        luma = float(np.dot(color, (0.299, 0.587, 0.114)))
        if luma < low - MIN_CONTRAST or luma > high + MIN_CONTRAST:
            fitting.append(color)
    return random_.choice(fitting) if fitting else None
