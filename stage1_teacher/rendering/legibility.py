"""Whether what a person asks for can come out at all: said before it is sampled, in words for who typed it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import cv2
import numpy as np

from stage1_teacher.inputs.input import Input, Line
from stage1_teacher.rendering.lines import Array, fit_box, largest_font
from stage1_teacher.rendering.rendered_input import choose_lines
from stage1_teacher.rendering.settings import RenderSettings

_LEAST_LATENTS = 2
"""Latents that a line's letters must be high: in fewer the VAE cannot show their strokes."""


def find_doubts(input_: Input, settings: RenderSettings, stride: int) -> list[str]:
    """Say what of an input will hardly be seen as it is asked for.

    Args:
        input_: its polygons refer to a frame, or to the image that is rendered.
        settings: how it is rendered.
        stride: pixels of an image to one latent.

    Returns:
        A line each: lines or characters that are left out, letters too small for their box, boxes that the edge
        cuts, boxes that overlap.

    Raises:
        FontLacksCharacters: no font has a line's characters.
    """
    return [*_left_out(input_, settings), *_too_small(input_, settings, stride), *_misplaced(input_, settings)]


def _left_out(input_: Input, settings: RenderSettings) -> Iterator[str]:
    if len(input_.lines) > settings.max_lines:
        yield (
            f"{len(input_.lines)} texts, of which inputs.max_lines = {settings.max_lines} are rendered, chosen by"
            " chance; ask for fewer, or set it higher"
        )
    for line in input_.lines:
        if len(line.text) > settings.max_chars:
            kept = line.text[: settings.max_chars]
            yield f"text {line.text!r} is cut to {kept!r}: inputs.max_chars = {settings.max_chars}; set it higher"


def _too_small(input_: Input, settings: RenderSettings, stride: int) -> Iterator[str]:
    least = _LEAST_LATENTS * stride
    for line, font in choose_lines(input_, settings, _frame(input_, settings)):
        fitting = largest_font(line.text, font, fit_box(_corners(line)))
        height = 0 if fitting is None else int(fitting.size)
        if line.text.strip() and height < least:
            yield (
                f"text {line.text!r} fits its box at {height} pixels' height and cannot be read below {least};"
                " make the box larger or the text shorter"
            )


def _misplaced(input_: Input, settings: RenderSettings) -> Iterator[str]:
    placed = [(line, _corners(line)) for line, _ in choose_lines(input_, settings, _frame(input_, settings))]
    height, width = settings.shape
    for line, corners in placed:
        if corners.min() < 0 or (corners.max(0) > (width, height)).any():
            yield (
                f"the box of {line.text!r} is cut by the edge of the image of {width} x {height} pixels;"
                " put all of it inside"
            )
    for (one, corners), (other, others) in combinations(placed, 2):
        area, _ = cv2.intersectConvexConvex(cv2.convexHull(corners), cv2.convexHull(others))
        if area >= 1:
            yield f"the boxes of {one.text!r} and {other.text!r} overlap by {area:.0f} pixels; move one of them"


def _frame(input_: Input, settings: RenderSettings) -> tuple[float, float]:
    height, width = settings.shape
    return input_.frame or (width, height)


def _corners(line: Line) -> Array:
    return np.array(line.polygon, np.float32)
