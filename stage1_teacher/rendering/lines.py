"""What AnyText2 sees of a line of text, rendered: glyph line, glyph map, position mask, font hint, masked image.

Behaviour follows upstream's dataset class (UPSTREAM names in brackets); what is random there (dilated positions,
partial font hints) is an augmentation of its training and absent here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Resampling

from stage1_teacher.inputs.fonts import load_font

GLYPH_LINE_HEIGHT, GLYPH_LINE_WIDTH = 80, 512
"""Of the OCR encoder's input."""
_FILL = 0.9
"""Share of the glyph line's width or height that the text fills."""
_MIN_INK = 10
"""Upstream lifts a rendered colour's channels to at least this, so that black text is not lost on black."""
_UPRIGHT_WITHIN = 10.0
"""Degrees from an axis within which a box that is higher than wide is written from top to bottom."""
_MAX_SPACES = 99

Array = NDArray[np.float32]
Mask = NDArray[np.uint8]


def render_glyph_line(text: str, font: Path) -> Array:
    """Render a line of text for the OCR encoder [draw_glyph].

    Args:
        text: one line.
        font: font file.

    Returns:
        (1, 80, 512) float32, 0 or 1: text centred, as large as fits nine tenths of width and height.
    """
    probe_size = 50
    left, top, right, bottom = load_font(font, probe_size).getbbox(text)
    ratio = min(GLYPH_LINE_WIDTH * _FILL / max(right - left, 5), GLYPH_LINE_HEIGHT * _FILL / max(bottom - top, 5))
    sized = load_font(font, max(int(probe_size * ratio), 1))
    left, top, right, bottom = sized.getbbox(text)
    x = (GLYPH_LINE_WIDTH - (right - left)) // 2
    y = (GLYPH_LINE_HEIGHT - bottom) // 2 - top // 2
    image = Image.new("1", (GLYPH_LINE_WIDTH, GLYPH_LINE_HEIGHT), 0)
    ImageDraw.Draw(image).text((int(x), int(y)), text, font=sized, fill=1)
    return np.asarray(image, np.float32)[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A polygon's minimum-area rectangle, as text is laid into it."""

    center: tuple[float, float]
    long: float
    short: float
    angle: float  # degrees counter-clockwise of the long side, in (-90, 90]
    left: int  # of the upright bounding box
    top: int
    width: int
    height: int

    @property
    def vertical(self) -> bool:
        """Whether text is written from top to bottom."""
        off_axis = min(abs(self.angle) % 90, 90 - abs(self.angle) % 90)
        return off_axis < _UPRIGHT_WITHIN and self.height >= self.width


def fit_box(polygon: Array) -> Box:
    """Return the smallest rectangle around a polygon, (n, 2) float32 pixels."""
    center, (w, h), clockwise = cv2.minAreaRect(polygon)
    corners = cv2.boxPoints((center, (w, h), clockwise)).astype(np.int64)
    # OpenCV's releases differ in which side they call the width; the long side's direction does not.
    angle = -clockwise if w >= h else 90.0 - clockwise
    angle = 90.0 - (90.0 - angle) % 180.0
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    return Box(
        center=(float(center[0]), float(center[1])),
        long=max(w, h),
        short=min(w, h),
        angle=angle,
        left=int(left),
        top=int(top),
        width=int(right - left),
        height=int(bottom - top),
    )


def _measure(text: str, font: ImageFont.FreeTypeFont) -> tuple[float, float]:
    left, top, right, bottom = font.getbbox(text)
    return right - left, bottom - top


def largest_font(text: str, font: Path, box: Box) -> ImageFont.FreeTypeFont | None:
    """Return the largest size at which the text fits the box along its long side; None if none does."""

    def fits(size: int) -> bool:
        width, height = _measure(text, load_font(font, size))
        return width <= box.long and height <= box.short

    low, high = 0, max(math.floor(box.short) - 1, 0)  # low fits (or is 0), above high is not tried
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return load_font(font, low) if low > 0 else None


def spread(text: str, font: ImageFont.FreeTypeFont, box: Box) -> str:
    """Put as many spaces between the characters as the box has room for."""
    spaced = text
    for count in range(1, _MAX_SPACES + 1):
        candidate = (" " * count).join(text)
        width, height = _measure(candidate, font)
        if width > box.long or height > box.short:
            return spaced
        spaced = candidate
    return text  # nothing fills the box (a single character has no gaps): as upstream, unspaced


def _write_across(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, box: Box) -> None:
    text = spread(text, font, box)
    left, top, right, bottom = font.getbbox(text)
    x = box.center[0] - (right - left) / 2
    y = box.center[1] - (bottom - top) / 2 - top
    draw.text((x, y), text, font=font, fill=255)


def _write_downwards(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, box: Box) -> None:
    heights = [_measure(character, font)[1] for character in text]
    gap = 0.0
    if len(text) > 1 and sum(heights) < box.long:
        gap = (box.long - sum(heights)) // (len(text) - 1)
    _, top, _, bottom = font.getbbox(text)
    x = box.left + box.width // 2 - (bottom - top) // 2  # the line's height stands in for a character's width
    y = float(box.top)
    for character, height in zip(text, heights, strict=True):
        draw.text((x, y), character, font=font, fill=255)
        y += height + gap


def render_glyph_map(text: str, polygon: Array, font: Path, color: Sequence[float], size: tuple[int, int]) -> Mask:
    """Render a line of text into its polygon, spread along it, rotated with it [draw_glyph2].

    Args:
        text: one line.
        polygon: (n, 2) x, y in pixels of `size`.
        font: font file.
        color: r, g, b in 0-255, or 500 for unknown. It decides how faint an anti-aliased pixel still counts:
            upstream renders in colour and takes what is not black.
        size: (H, W), pixels.

    Returns:
        (H, W) uint8, 0 or 1; all 0 where the polygon is too small for one pixel of text.
    """
    coverage = render_coverage(text, polygon, font, size)
    brightest = min(max(*color, _MIN_INK), 255)
    return (brightest * coverage >= 0.5).astype(np.uint8)


def render_coverage(
    text: str, polygon: Array, font: Path, size: tuple[int, int], *, resample: Resampling = Resampling.NEAREST
) -> Array:
    """Render the anti-aliased line of text that a glyph map is made of.

    Args:
        text: one line.
        polygon: (n, 2) x, y in pixels of `size`.
        font: font file.
        size: (H, W), pixels.
        resample: how a slanted line is turned; glyph maps take the nearest pixel, as upstream.

    Returns:
        (H, W) float32, 0 to 1; all 0 where the polygon is too small for one pixel of text.
    """
    height, width = size
    layer = Image.new("L", (width, height), 0)
    box = fit_box(polygon)
    sized = largest_font(text, font, box)
    if sized is not None:
        draw = ImageDraw.Draw(layer)
        if box.vertical:
            _write_downwards(draw, text, sized, box)
        else:
            _write_across(draw, text, sized, box)
            layer = _rotate(layer, box, resample)
    return np.asarray(layer, np.float32) / np.float32(255)


def _rotate(layer: Image.Image, box: Box, resample: Resampling) -> Image.Image:
    """Turn a layer about the box's centre, clipped to its own size."""
    turned = layer.rotate(box.angle, resample=resample, expand=True, center=box.center)
    whole = Image.new("L", layer.size, 0)
    offset = int((layer.width - turned.width) / 2), int((layer.height - turned.height) / 2)
    whole.paste(turned, offset)
    return whole


def render_mask(polygon: Array, size: tuple[int, int]) -> Mask:
    """Fill a polygon, its outline included [draw_pos, draw_inv_mask].

    Args:
        polygon: (n, 2) x, y in pixels; rounded to whole pixels.
        size: (H, W).

    Returns:
        (H, W) uint8, 0 or 1.
    """
    mask = np.zeros(size, np.uint8)
    cv2.fillPoly(mask, [np.rint(polygon).astype(np.int32).reshape(-1, 1, 2)], color=1)
    return mask


def cut_font_hint(image: Array, polygon: Array) -> Array:
    """Take the look of a line from an image: what is darker than its neighbourhood, inside the polygon.

    Args:
        image: (3, H, W) float32 in [-1, 1].
        polygon: (n, 2) x, y in pixels.

    Returns:
        (H, W) float32, 0 or 1.
    """
    height, width = image.shape[1:]
    inside = np.clip(polygon, 0, [width - 1, height - 1]).astype(np.int32)
    x, y, w, h = cv2.boundingRect(inside)
    crop = image[:, y : y + h, x : x + w].transpose(1, 2, 0)
    gray = cv2.cvtColor((((crop + 1.0) / 2.0) * 255).astype(np.uint8), cv2.COLOR_RGB2GRAY)
    brighter = cv2.adaptiveThreshold(gray, 255, cv2.ADAPTIVE_THRESH_GAUSSIAN_C, cv2.THRESH_BINARY, 11, 2)
    hint = np.zeros((height, width), np.float32)
    hint[y : y + h, x : x + w] = brighter == 0
    return hint * render_mask(inside.astype(np.float32), (height, width))


def mask_image(image: Array | None, positions: Mask, mode: str) -> Array:
    """Make the image that WriteNet may look at.

    Args:
        image: (3, H, W) float32 in [-1, 1]; not needed to generate.
        positions: (n, H, W) uint8, the lines' masks.
        mode: "generate" (nothing is shown) or "edit" (everything but the lines).

    Returns:
        (3, H, W) float32: -1 where nothing is shown, else the image.

    Raises:
        ValueError: edit mode without an image.
    """
    if mode == "generate":
        return np.full((3, *positions.shape[1:]), -1.0, np.float32)
    if image is None:
        raise ValueError("edit mode needs an image")
    covered = positions.any(0).astype(np.float32)  # (H, W)
    return np.clip(image - 10 * covered, -1, 1).astype(np.float32)
