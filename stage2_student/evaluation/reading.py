"""Reading sampled images: each line of a layout is cut out, read, and its colour taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from common.layouts import Color, Layout, Line
from stage2_student.evaluation.crops import MARGIN, cut_line, ink_mask, line_height
from stage2_student.evaluation.judges import Judge, Reading
from stage2_student.evaluation.metrics import composed

PUREST = 70
"""Percentile of the distance to the ground from which an ink pixel's colour counts: edges are mixtures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LineResult:
    """What was asked for on one line, and what was found."""

    text: str
    """Asked for."""
    read: str
    """Found by the judge."""
    confidence: float
    """Of the judge, 0 to 1."""
    height: float
    """Of the line's polygon across its direction, in pixels of the layout's size."""
    color: Color | None
    """Asked for."""
    found_color: Color | None
    """Of the text's pixels; None if nothing stands out, or no colour was asked for."""
    in_glyph_map: bool = True
    """Whether the glyph map showed the line."""

    @property
    def exact(self) -> bool:
        """Whether the line counts for Sen. Acc."""
        return composed(self.text) == composed(self.read)


def read_images(
    judge: Judge, images: Sequence[NDArray[np.uint8]], layouts: Sequence[Layout]
) -> list[tuple[LineResult, ...]]:
    """Read every line of every image.

    Args:
        judge: reads the crops, all in one call.
        images: each (H, W, 3) uint8 RGB; one of another size than its layout is read at its own size.
        layouts: what each image should show.

    Returns:
        For each image its lines' results, in the layout's order.
    """
    pairs = list(zip(images, layouts, strict=True))
    candidates = [
        [cut_line(image, scale_polygon(line, layout, image)) for line in layout.lines] for image, layout in pairs
    ]
    readings = iter(judge.read([crop for lines in candidates for crops in lines for crop in crops]))
    results = []
    for (_, layout), lines in zip(pairs, candidates, strict=True):
        results.append(
            tuple(
                _result(line, crops, [next(readings) for _ in crops])
                for line, crops in zip(layout.lines, lines, strict=True)
            )
        )
    return results


def scale_polygon(line: Line, layout: Layout, image: NDArray[np.uint8]) -> list[tuple[float, float]]:
    """Return a line's polygon in an image's own pixels."""
    scale_y, scale_x = image.shape[0] / layout.size[0], image.shape[1] / layout.size[1]
    return [(x * scale_x, y * scale_y) for x, y in line.polygon]


def _result(line: Line, crops: Sequence[NDArray[np.uint8]], readings: Sequence[Reading]) -> LineResult:
    surest = max(readings, key=lambda reading: reading.confidence)  # the first of equals: the likeliest direction
    return LineResult(
        text=line.text,
        read=surest.text,
        confidence=round(surest.confidence, 4),
        height=round(line_height(line.polygon), 2),
        color=line.color,
        found_color=None if line.color is None else text_color(crops[0]),
        in_glyph_map=line.in_glyph_map,
    )


def text_color(crop: NDArray[np.uint8]) -> Color | None:
    """Return the colour of the text in a crop, or None if nothing stands out from its ground.

    Args:
        crop: (h, w, 3) uint8 RGB, text surrounded by ground.
    """
    ink = ink_mask(crop)
    if not ink.any():
        return None
    pixels = crop.astype(np.float32)
    ground = np.median(pixels[~ink], axis=0) if (~ink).any() else pixels.mean(axis=(0, 1))
    distance = np.linalg.norm(pixels[ink] - ground, axis=1)
    red, green, blue = np.median(pixels[ink][distance >= np.percentile(distance, PUREST)], axis=0)
    return float(red), float(green), float(blue)


def ground_difference(image: NDArray[np.uint8], truth: NDArray[np.uint8], layout: Layout) -> float | None:
    """Return how far what lies outside the lines looks from the true image, or None if nothing does.

    Args:
        image: sampled, (H, W, 3) uint8 RGB.
        truth: what the layout was taken from, (H', W', 3); scaled to the sampled image's size.
        layout: lines, kept out with the margin that they are read with.

    Returns:
        The mean over pixels of the colour difference Delta E*ab (CIE 1976); about 2 is just seen.
    """
    outside = np.ones(image.shape[:2], np.uint8)
    for line in layout.lines:
        polygon = scale_polygon(line, layout, image)
        corners = [np.rint(np.asarray(polygon)).astype(np.int32)]
        cv2.fillPoly(outside, corners, (0,))
        cv2.polylines(outside, corners, True, (0,), thickness=1 + 2 * round(MARGIN * line_height(polygon)))
    if not outside.any():
        return None
    truth = np.asarray(cv2.resize(truth, image.shape[1::-1], interpolation=cv2.INTER_AREA), np.uint8)
    difference = np.linalg.norm(_lab(image) - _lab(truth), axis=2)
    return float(difference[outside > 0].mean())


def _lab(rgb: NDArray[np.generic]) -> NDArray[np.float32]:
    """Convert (h, w, 3) of 0-255 to CIELAB."""
    return np.asarray(cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), np.float32)


def color_difference(color: Color, other: Color) -> float:
    """Return how different two colours look, Delta E*ab (CIE 1976); about 2 is just seen."""
    lab = _lab(np.asarray([[color, other]]))[0]  # (2, 3)
    return float(np.linalg.norm(lab[0] - lab[1]))


def nearest_color(color: Color, palette: Sequence[Color]) -> int:
    """Return the index of the palette's colour that looks most like one.

    Args:
        color: r, g, b in 0-255.
        palette: at least one colour.

    Source: Euclidean distance in CIELAB (CIE 1976).
    """
    lab = _lab(np.asarray([[color, *palette]]))[0]  # (1 + n, 3)
    return int(np.argmin(np.linalg.norm(lab[1:] - lab[0], axis=1)))


def color_right(result: LineResult, palette: Sequence[Color]) -> bool | None:
    """Whether the palette's colour nearest to the text is the one asked for; None if none was asked for."""
    if result.color is None or not palette:
        return None
    if result.found_color is None:
        return False
    return nearest_color(result.found_color, palette) == nearest_color(result.color, palette)
