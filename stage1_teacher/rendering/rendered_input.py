"""One input, drawn: everything that the teacher encodes. Where `content` says what, this says how it looks."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from common.config import Config
from common.seeding import rng
from stage1_teacher.inputs import captions
from stage1_teacher.inputs.fonts import can_draw, configured_fonts, load_font
from stage1_teacher.inputs.input import Content, InputFailure, Line, Polygon
from stage1_teacher.rendering import lines as drawing
from stage1_teacher.rendering.images import decode_image, read_image_file

_NO_TEXT = " "
_NO_TEXT_BOX = ((10.0, 10.0), (100.0, 10.0), (100.0, 100.0), (10.0, 100.0))
_NO_TEXT_FRAME = 512.0
"""Upstream's stand-in for an image without text: one blank line in a corner of 512 x 512."""
_MAX_SIDES = 8.0
"""Image sides that a polygon may reach out: text as large as its polygon is drawn whole before it is clipped."""
_MIN_SIDE = 1.0
"""Pixels: a thinner polygon has no inside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawSettings:
    """What the drawing of an input depends on besides the input."""

    seed: int
    """Keys every choice, unless the input has its own."""
    size: int
    """Side of the square image, pixels."""
    font: Path
    """Draws lines that name no font."""
    fonts: Mapping[str, Path]
    """Configured fonts by name."""
    random_fonts: bool
    font_hint_prob: float
    edit_fraction: float
    max_lines: int
    max_chars: int
    prompt_suffix: str
    needs_image: bool
    """Inputs without an image fail."""

    @staticmethod
    def from_config(config: Config) -> DrawSettings:
        """Take the settings from a configuration and check its fonts.

        Raises:
            DataError: a font file is missing or no font.
        """
        font = config.resolve(config.inputs.font, "inputs.font")
        fonts = configured_fonts(config)
        for path in (font, *fonts.values()):
            load_font(path, 32)
        return DrawSettings(
            seed=config.precompute.seed,
            size=config.inputs.size,
            font=font,
            fonts=fonts,
            random_fonts=config.inputs.random_fonts,
            font_hint_prob=config.inputs.font_hint_prob,
            edit_fraction=config.inputs.edit_fraction,
            max_lines=config.inputs.max_lines,
            max_chars=config.inputs.max_chars,
            prompt_suffix=config.teacher.prompt_suffix,
            needs_image=config.precompute.source == "noised",
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DrawnInput:
    """An input as the teacher gets it; tensors are on the CPU. n lines, H = W = size."""

    input_id: str
    caption: str
    """Of the image, cut, with the suffix."""
    text_caption: str
    """With one placeholder per line."""
    texts: tuple[str, ...]
    """As drawn: cut at `max_chars`."""
    languages: tuple[str, ...]
    polygons: tuple[Polygon, ...]
    """In pixels of `size`."""
    colors: Tensor
    """(n, 3) float32: r, g, b in 0-255, 500 each for unknown."""
    in_glyph_map: tuple[bool, ...]
    """Which lines `glyphs` shows."""
    mode: str
    """"generate" or "edit"."""
    size: tuple[int, int]
    """(H, W), pixels."""
    seed: int
    """Keys the noise, with the input's id."""
    glyphs: Tensor
    """(1, H, W) uint8, 0 or 1: union of the drawn lines, without those that are not to be in the glyph map."""
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


def draw_input(content: Content, settings: DrawSettings) -> DrawnInput:
    """Read an input's image, make its choices and draw it.

    Every random choice is keyed by (seed, input id, purpose), so the result depends on nothing else.

    Raises:
        InputFailure: the image is missing or broken, or a polygon lies outside it or has no area.
    """
    image, frame = _read_image(content, settings)
    seed = settings.seed if content.seed is None else content.seed
    choice = _Choice(content, settings, seed)
    lines = choice.lines(frame)
    mode = choice.mode(image is not None)
    drawn = [_draw_line(line, place, choice, image) for place, line in enumerate(lines)]
    positions = np.stack([line.position for line in drawn])
    return DrawnInput(
        input_id=content.input_id,
        caption=captions.image_caption(
            content.caption, suffix=settings.prompt_suffix, seed=seed, input_id=content.input_id
        ),
        text_caption=captions.text_caption(len(lines), seed=seed, input_id=content.input_id),
        texts=tuple(line.text for line in lines),
        languages=tuple(captions.refine_language(line.language, line.text) for line in lines),
        polygons=tuple(line.polygon for line in lines),
        colors=torch.tensor([line.color for line in lines], dtype=torch.float32),
        in_glyph_map=tuple(line.in_glyph_map for line in lines),
        mode=mode,
        size=(settings.size, settings.size),
        seed=seed,
        glyphs=torch.from_numpy(np.maximum.reduce([line.glyphs for line in drawn])[None]),
        positions=torch.from_numpy(positions),
        glyph_lines=torch.from_numpy(np.stack([line.glyph_line for line in drawn])),
        font_hint=torch.from_numpy(np.maximum.reduce([line.font_hint for line in drawn])[None]),
        masked_image=torch.from_numpy(drawing.mask_image(image, positions, mode)),
        image=None if image is None else torch.from_numpy(image),
    )


def _read_image(content: Content, settings: DrawSettings) -> tuple[drawing.Array | None, tuple[float, float]]:
    """Return the image, (3, H, W), if there is one, and the (width, height) that polygons refer to."""
    if content.image is None:
        if settings.needs_image:
            raise InputFailure("image missing", f'{content.where}: precompute.source = "noised" needs an image')
        side = settings.size if content.frame is None else content.frame
        return None, (side, side)
    data = read_image_file(content.image, content.where)
    image, own_size = decode_image(data, settings.size, content.where)
    return image, own_size if content.frame is None else (content.frame, content.frame)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What is left to chance about one input, each choice with its own key."""

    content: Content
    settings: DrawSettings
    seed: int

    def _rng(self, *purpose: str | int) -> random.Random:
        return rng(self.seed, self.content.input_id, *purpose)

    def mode(self, has_image: bool) -> str:
        """Return "edit" for `edit_fraction` of the inputs that have an image."""
        if self.content.mode is not None:
            return self.content.mode
        return "edit" if has_image and self._rng("mode").random() < self.settings.edit_fraction else "generate"

    def lines(self, frame: tuple[float, float]) -> list[Line]:
        """Return at most `max_lines` lines, cut at `max_chars`, their polygons in pixels of `size`."""
        size, lines = self.settings.size, list(self.content.lines)
        if len(lines) > self.settings.max_lines:
            kept = sorted(self._rng("lines").sample(range(len(lines)), self.settings.max_lines))
            lines = [lines[place] for place in kept]
        if not lines:
            lines, frame = [Line(text=_NO_TEXT, polygon=_NO_TEXT_BOX)], (_NO_TEXT_FRAME, _NO_TEXT_FRAME)
        scale_x, scale_y = size / frame[0], size / frame[1]
        return [
            replace(
                line,
                text=line.text[: self.settings.max_chars],
                polygon=tuple((x * scale_x, y * scale_y) for x, y in line.polygon),
            )
            for line in lines
        ]

    def font(self, line: Line, place: int) -> Path:
        """Return the font that draws a line."""
        if line.font is not None:
            return line.font
        if not self.settings.random_fonts:
            return self.settings.font
        named = [path for _, path in sorted(self.settings.fonts.items())]
        able = [path for path in dict.fromkeys((self.settings.font, *named)) if can_draw(path, line.text)]
        return self._rng("font", place).choice(able) if able else self.settings.font

    def shows_font(self, place: int) -> bool:
        """Tell whether the teacher is told how a line looks."""
        return self._rng("font hint", place).random() < self.settings.font_hint_prob


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _DrawnLine:
    """One line's drawings; (H, W) each but `glyph_line`, (1, 80, 512)."""

    position: drawing.Mask
    glyphs: drawing.Mask
    glyph_line: drawing.Array
    font_hint: drawing.Array


def _draw_line(line: Line, place: int, choice: _Choice, image: drawing.Array | None) -> _DrawnLine:
    side = choice.settings.size
    polygon = np.array(line.polygon, np.float32)
    where = f"{choice.content.where}: line {line.text!r}"
    if np.abs(polygon).max() > _MAX_SIDES * side:
        raise InputFailure("bad polygon", f"{where}: polygon reaches far out of the image")
    if min(cv2.minAreaRect(polygon)[1]) < _MIN_SIDE:
        raise InputFailure("bad polygon", f"{where}: polygon is less than a pixel wide at {side} x {side}")
    position = drawing.draw_mask(polygon, (side, side))
    if not position.any():
        raise InputFailure("bad polygon", f"{where}: polygon lies outside the image")
    font = choice.font(line, place)
    glyphs = drawing.draw_glyph_map(line.text, polygon, font, line.color, (side, side))
    hint = np.zeros((side, side), np.float32)
    if choice.shows_font(place):
        if line.font is not None:  # asked for: the drawn line itself shows the look
            hint = glyphs.astype(np.float32)
        elif image is not None:
            hint = drawing.draw_font_hint(image, polygon)
    if not line.in_glyph_map:
        glyphs = np.zeros_like(glyphs)
    return _DrawnLine(
        position=position, glyphs=glyphs, glyph_line=drawing.draw_glyph_line(line.text, font), font_hint=hint
    )
