"""One input, rendered: all that the teacher encodes. `inputs.input` has what it says, this how it looks."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from common.seeding import rng
from stage1_teacher.inputs import captions
from stage1_teacher.inputs.fonts import (
    has_glyphs,
    missing_characters,
)
from stage1_teacher.inputs.input import FontLacksCharacters, Input, InputFailure, Line, Mode, Polygon
from stage1_teacher.rendering import lines as rendering
from stage1_teacher.rendering.images import decode_image, read_image_file
from stage1_teacher.rendering.settings import RenderSettings

_NO_TEXT = " "
_NO_TEXT_BOX = ((10.0, 10.0), (100.0, 10.0), (100.0, 100.0), (10.0, 100.0))
_NO_TEXT_FRAME = 512.0
"""Upstream's stand-in for an image without text: one blank line in a corner of 512 x 512."""
_MAX_SIDES = 8.0
"""Image sides that a polygon may reach out: text as large as its polygon is rendered whole, then clipped."""
_MIN_SIDE = 1.0
"""Pixels: a thinner polygon has no inside."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RenderedInput:
    """An input as the teacher gets it; tensors are on the CPU. n lines, H = W = size."""

    input_id: str
    caption: str
    """Of the image, cut, with the suffix."""
    text_caption: str
    """With one placeholder per line."""
    texts: tuple[str, ...]
    """As rendered: cut at `max_chars`."""
    languages: tuple[str, ...]
    polygons: tuple[Polygon, ...]
    """In pixels of the image."""
    colors: Tensor
    """(n, 3) float32: r, g, b in 0-255, 500 each for unknown."""
    in_glyph_map: tuple[bool, ...]
    """Which lines `glyphs` shows."""
    mode: Mode
    size: tuple[int, int]
    """(H, W), pixels."""
    seed: int
    """Keys the noise, with the input's id."""
    glyphs: Tensor
    """(1, H, W) uint8, 0 or 1: union of the rendered lines, without those that are not to be in the glyph map."""
    positions: Tensor
    """(n, H, W) uint8, 0 or 1: each line's polygon."""
    glyph_lines: Tensor
    """(n, 1, 80, 512) float32, 0 or 1."""
    font_hint: Tensor
    """(1, H, W) float32, 0 or 1: the lines' look, all 0 where nothing is known."""
    masked_image: Tensor
    """(3, H, W) float32 in [-1, 1]: what WriteNet may see of the image."""
    image: Tensor | None
    """(3, H, W) float32 in [-1, 1]; None if the input has none."""


def render_input(input_: Input, settings: RenderSettings) -> RenderedInput:
    """Read an input's image, make its choices and render it.

    Every random choice is keyed by (seed, input id, purpose), so the result depends on nothing else.

    Raises:
        InputFailure: the image is missing or broken, a polygon lies outside it or has no area, or no font has a
            line's characters.
    """
    image, frame = _read_image(input_, settings)
    seed = settings.seed if input_.seed is None else input_.seed
    choice = _Choice(input_, settings, seed)
    lines = choice.lines(frame)
    mode = choice.mode(image is not None)
    rendered = [_render_line(line, place, choice, image) for place, line in enumerate(lines)]
    positions = np.stack([line.position for line in rendered])
    return RenderedInput(
        input_id=input_.input_id,
        caption=captions.image_caption(
            input_.caption, suffix=settings.prompt_suffix, seed=seed, input_id=input_.input_id
        ),
        text_caption=captions.text_caption(len(lines), seed=seed, input_id=input_.input_id),
        texts=tuple(line.text for line in lines),
        languages=tuple(captions.refine_language(line.language, line.text) for line in lines),
        polygons=tuple(line.polygon for line in lines),
        colors=torch.tensor([line.color for line in lines], dtype=torch.float32),
        in_glyph_map=tuple(line.in_glyph_map for line in lines),
        mode=mode,
        size=settings.shape,
        seed=seed,
        glyphs=torch.from_numpy(np.maximum.reduce([line.glyphs for line in rendered])[None]),
        positions=torch.from_numpy(positions),
        glyph_lines=torch.from_numpy(np.stack([line.glyph_line for line in rendered])),
        font_hint=torch.from_numpy(np.maximum.reduce([line.font_hint for line in rendered])[None]),
        masked_image=torch.from_numpy(rendering.mask_image(image, positions, mode)),
        image=None if image is None else torch.from_numpy(image),
    )


def _read_image(input_: Input, settings: RenderSettings) -> tuple[rendering.Array | None, tuple[float, float]]:
    """Return the image, (3, H, W), if there is one, and the (width, height) that polygons refer to."""
    if input_.image is None:
        if settings.needs_image:
            raise InputFailure("image missing", f'{input_.where}: precompute.source = "noised" needs an image')
        height, width = settings.shape
        return None, input_.frame or (width, height)
    data = read_image_file(input_.image, input_.where)
    image, own_size = decode_image(data, settings.shape, input_.where)
    return image, input_.frame or own_size


@dataclass(frozen=True, slots=True)
class _Choice:
    """What is left to chance about one input, each choice with its own key."""

    input_: Input
    settings: RenderSettings
    seed: int

    def _rng(self, *purpose: str | int) -> random.Random:
        return rng(self.seed, self.input_.input_id, *purpose)

    def mode(self, has_image: bool) -> Mode:
        """Return "edit" for `edit_fraction` of the inputs that have an image."""
        if self.input_.mode is not None:
            return self.input_.mode
        return "edit" if has_image and self._rng("mode").random() < self.settings.edit_fraction else "generate"

    def lines(self, frame: tuple[float, float]) -> list[Line]:
        """Return at most `max_lines` lines, cut at `max_chars`, their polygons in pixels of the image."""
        (height, width), lines = self.settings.shape, list(self.input_.lines)
        if len(lines) > self.settings.max_lines:
            kept = sorted(self._rng("lines").sample(range(len(lines)), self.settings.max_lines))
            lines = [lines[place] for place in kept]
        if not lines:
            lines, frame = [Line(text=_NO_TEXT, polygon=_NO_TEXT_BOX)], (_NO_TEXT_FRAME, _NO_TEXT_FRAME)
        scale_x, scale_y = width / frame[0], height / frame[1]
        return [
            replace(
                line,
                text=line.text[: self.settings.max_chars],
                polygon=tuple((x * scale_x, y * scale_y) for x, y in line.polygon),
            )
            for line in lines
        ]

    def font(self, line: Line, place: int) -> Path:
        """Return the font that renders a line.

        Raises:
            FontLacksCharacters: none that may has all of its characters.
        """
        wanted = self._wanted_font(line, place)
        for path in (wanted, *self.settings.fallback_fonts):
            if has_glyphs(path, line.text):
                return path
        missing = missing_characters(wanted, line.text)
        nor = ", nor has one font of inputs.fallback_fonts all characters of the line"
        raise FontLacksCharacters(
            missing,
            f"{self.input_.where}: line {line.text!r}: font {wanted.name} lacks {_spell(missing)}"
            f"{nor if self.settings.fallback_fonts else ''}; add a font that has them to inputs.fallback_fonts",
        )

    def _wanted_font(self, line: Line, place: int) -> Path:
        if line.font is not None:
            return line.font
        if not self.settings.random_fonts:
            return self.settings.font
        named = [path for _, path in sorted(self.settings.fonts.items())]
        able = [path for path in dict.fromkeys((self.settings.font, *named)) if has_glyphs(path, line.text)]
        return self._rng("font", place).choice(able) if able else self.settings.font

    def shows_font(self, place: int) -> bool:
        """Tell whether the teacher is told how a line looks."""
        return self._rng("font hint", place).random() < self.settings.font_hint_prob


def _spell(characters: str) -> str:
    """Name characters for a message, at most eight."""
    named = [f"{character} (U+{ord(character):04X})" for character in characters[:8]]
    return " ".join(named) + (f" and {len(characters) - 8} more" if len(characters) > 8 else "")


def choose_lines(input_: Input, settings: RenderSettings, frame: tuple[float, float]) -> list[tuple[Line, Path]]:
    """Return the lines that `render_input` renders, each with its font, without opening the image.

    Args:
        input_: read.
        settings: how it is rendered.
        frame: (width, height) that polygons refer to.

    Raises:
        FontLacksCharacters: no font has a line's characters.
    """
    choice = _Choice(input_, settings, settings.seed if input_.seed is None else input_.seed)
    return [(line, choice.font(line, place)) for place, line in enumerate(choice.lines(frame))]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _RenderedLine:
    """One line's drawings; (H, W) each but `glyph_line`, (1, 80, 512)."""

    position: rendering.Mask
    glyphs: rendering.Mask
    glyph_line: rendering.Array
    font_hint: rendering.Array


def _render_line(line: Line, place: int, choice: _Choice, image: rendering.Array | None) -> _RenderedLine:
    shape = choice.settings.shape
    polygon = np.array(line.polygon, np.float32)
    where = f"{choice.input_.where}: line {line.text!r}"
    if np.abs(polygon).max() > _MAX_SIDES * max(shape):
        raise InputFailure("bad polygon", f"{where}: polygon reaches far out of the image")
    if min(cv2.minAreaRect(polygon)[1]) < _MIN_SIDE:
        raise InputFailure("bad polygon", f"{where}: polygon is less than a pixel wide at {shape[1]} x {shape[0]}")
    position = rendering.render_mask(polygon, shape)
    if not position.any():
        raise InputFailure("bad polygon", f"{where}: polygon lies outside the image")
    font = choice.font(line, place)
    glyphs = rendering.render_glyph_map(line.text, polygon, font, line.color, shape)
    hint = np.zeros(shape, np.float32)
    if choice.shows_font(place):
        if line.font is not None:  # asked for: the rendered line itself shows the look
            hint = glyphs.astype(np.float32)
        elif image is not None:
            hint = rendering.cut_font_hint(image, polygon)
    if not line.in_glyph_map:
        glyphs = np.zeros_like(glyphs)
    return _RenderedLine(
        position=position, glyphs=glyphs, glyph_line=rendering.render_glyph_line(line.text, font), font_hint=hint
    )
