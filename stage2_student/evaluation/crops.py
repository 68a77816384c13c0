"""Cutting a line of text out of an image by its polygon, straightened for a judge.

A judge reads upright horizontal lines. A polygon does not say how its text runs, so that steep ones give
several candidates; the reader keeps the one that the judge is surest of, which takes no knowledge of the
right text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

MARGIN = 0.15
"""Ground kept around the polygon, as a share of the line's height: text that touches the edge is misread."""
STEEP_DEGREES = 60.0
"""Lines steeper than this may be read upwards or downwards."""
UPRIGHT_DEGREES = 10.0
"""Boxes this close to vertical may hold upright characters one above the other, as AnyText2 renders them."""
SQUARE_RATIO = 1.2
"""Up to this ratio of its sides a box has no long side: the more horizontal one is the line's direction."""

Points = NDArray[np.float32]


def text_quad(polygon: Sequence[Sequence[float]]) -> Points:
    """Return the four corners of a line, in the order in which its text runs.

    A convex quadrilateral is kept (perspective); any other polygon becomes its smallest rotated rectangle.

    Args:
        polygon: (n, 2) pixels, n >= 3.

    Returns:
        (4, 2) float32: text's top left, top right, bottom right, bottom left; the text runs along the long side,
        to the right.
    """
    points = np.asarray(polygon, np.float32).reshape(-1, 2)
    hull = cv2.convexHull(points).reshape(-1, 2)
    quad = hull if len(points) == 4 and len(hull) == 4 else cv2.boxPoints(cv2.minAreaRect(points))
    quad = _clockwise(quad.astype(np.float32))
    across, along = _side(quad, 0), _side(quad, 1)
    lengths = float(np.linalg.norm(across)), float(np.linalg.norm(along))
    nearly_square = max(lengths) <= SQUARE_RATIO * min(lengths)
    steepness = abs(across[1]) / max(lengths[0], 1e-6), abs(along[1]) / max(lengths[1], 1e-6)
    second = steepness[1] < steepness[0] if nearly_square else lengths[1] > lengths[0]
    if second:
        quad = np.roll(quad, -1, axis=0)
    if _side(quad, 0)[0] < 0:
        quad = np.roll(quad, -2, axis=0)
    return quad


def line_height(polygon: Sequence[Sequence[float]]) -> float:
    """Return the height of a line's polygon across its direction, pixels (for a vertical line its width)."""
    quad = text_quad(polygon)
    return float(np.linalg.norm(_side(quad, 1)))


def cut_line(image: NDArray[np.uint8], polygon: Sequence[Sequence[float]]) -> list[NDArray[np.uint8]]:
    """Cut out a line in every direction in which its text may run.

    Args:
        image: (H, W, 3) uint8 RGB.
        polygon: (n, 2) pixels.

    Returns:
        One or more crops (h, w, 3) uint8, the likeliest first. Outside of the image the edge is repeated.
    """
    quad = text_quad(polygon)
    direction, down = _side(quad, 0), _side(quad, 1)
    steepness = math.degrees(math.atan2(abs(direction[1]), abs(direction[0])))
    straight = warp(image, quad)
    if steepness <= STEEP_DEGREES:
        # AnyText2 stacks characters in any box that is at least as high as wide.
        stacked = steepness <= UPRIGHT_DEGREES and np.linalg.norm(down) >= np.linalg.norm(direction)
        return [straight, unstack(straight)] if stacked else [straight]
    crops = [straight, np.ascontiguousarray(straight[::-1, ::-1])]
    if steepness >= 90 - UPRIGHT_DEGREES:
        upright = np.rot90(straight, -1 if direction[1] > 0 else 1)
        crops.append(unstack(np.ascontiguousarray(upright)))
    return crops


def warp(image: NDArray[np.uint8], quad: Points, margin: float = MARGIN) -> NDArray[np.uint8]:
    """Map a quadrilateral (and a margin around it) onto an upright rectangle of its own size.

    Args:
        image: (H, W, 3) uint8.
        quad: (4, 2) corners, from the text's top left clockwise.
        margin: in units of the quadrilateral's height.

    Returns:
        (h, w, 3) uint8, at least 1 x 1.
    """
    width = max(1.0, float(np.linalg.norm(_side(quad, 0))))
    height = max(1.0, float(np.linalg.norm(_side(quad, 1))))
    pad = margin * height
    target = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32) + np.float32(pad)
    size = max(1, round(width + 2 * pad)), max(1, round(height + 2 * pad))
    transform = cv2.getPerspectiveTransform(quad.astype(np.float32), target)
    crop: Any = cv2.warpPerspective(image, transform, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(crop, np.uint8)


def unstack(column: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay the characters of a column, written one below the other, side by side.

    Characters are told apart by rows without ink; parts of one character ("i", or those of many Chinese ones) stay
    together by their size against the column's width.

    Args:
        column: (h, w, 3) uint8, upright.

    Returns:
        (h', w', 3) uint8, one line; the column itself if nothing stands out of its ground.
    """
    ink = ink_mask(column)
    runs = _merge_parts(_runs(np.asarray(ink.any(axis=1))), width=int(ink.any(axis=0).sum()))
    if not runs:
        return column
    gap = max(2, column.shape[1] // 12)  # as letters of one word: wider ones are taken for full-width forms
    height = max(stop - start for start, stop in runs) + 2 * gap
    cells = []
    for start, stop in runs:
        columns = np.flatnonzero(ink[start:stop].any(axis=0))
        left, right = max(0, int(columns[0]) - gap), min(column.shape[1], int(columns[-1]) + 1 + gap)
        middle = (start + stop) // 2
        rows = np.clip(np.arange(middle - height // 2, middle + height - height // 2), start - gap, stop + gap - 1)
        cells.append(column[np.clip(rows, 0, len(column) - 1), left:right])
    return np.ascontiguousarray(np.concatenate(cells, axis=1))


def ink_mask(crop: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tell text from ground: pixels far in colour from the crop's border, split where Otsu's method says.

    Args:
        crop: (h, w, 3) uint8, text surrounded by ground.

    Returns:
        (h, w) bool, all False if the crop is of one colour.
    """
    border = np.concatenate([crop[0], crop[-1], crop[:, 0], crop[:, -1]]).astype(np.float32)
    distance = np.linalg.norm(crop.astype(np.float32) - np.median(border, axis=0), axis=2)
    scaled = np.minimum(distance / 2, 255).astype(np.uint8)  # at most 441 apart
    threshold, _ = cv2.threshold(scaled, 0, 255, cv2.THRESH_OTSU)
    return np.asarray(scaled > max(threshold, 4))


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the (start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _merge_parts(runs: list[tuple[int, int]], width: int) -> list[tuple[int, int]]:
    """Join a run to the one before if both are one character high, or the one before is a mere dot."""
    merged: list[tuple[int, int]] = []
    for start, stop in runs:
        if merged:
            first, last = merged[-1]
            if stop - first <= 0.95 * width or last - first <= 0.3 * width:
                merged[-1] = (first, stop)
                continue
        merged.append((start, stop))
    return merged


def _clockwise(quad: Points) -> Points:
    """Order corners clockwise as seen (y points down), the first one nearest to the image's origin."""
    centre = quad.mean(axis=0)
    angles = np.arctan2(quad[:, 1] - centre[1], quad[:, 0] - centre[0])
    quad = quad[np.argsort(angles)]
    return np.roll(quad, -int(np.argmin(quad.sum(axis=1))), axis=0)


def _side(quad: Points, index: int) -> NDArray[np.float32]:
    """Return the mean of two opposite sides as a vector: index 0 along the text, 1 down across it."""
    first = quad[(index + 1) % 4] - quad[index]
    opposite = quad[(index + 2) % 4] - quad[(index + 3) % 4]
    mean: NDArray[np.float32] = (first + opposite) / 2
    return mean
