"""What an image should show: which text, where, in which colour; independent of who samples it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from common.files import canonical_json

Color = tuple[float, float, float]
"""Red, green, blue, 0 to 255."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of text that an image should show."""

    text: str
    """Exactly as it should be read."""
    polygon: tuple[tuple[float, float], ...]
    """Corners (x, y) in pixels of the layout's size, at least three."""
    color: Color | None = None
    """The colour asked for; None if none was."""
    in_glyph_map: bool = True
    """Whether the glyph map shows the line; else its embedding alone says what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One image to be sampled and read."""

    layout_id: str
    """The input's id; keys the noise, so that runs are compared on the same."""
    size: tuple[int, int]
    """(H, W) of the image in whose pixels the polygons are."""
    lines: tuple[Line, ...]
    """Lines with text; may be empty."""
    caption: str = ""
    """The image caption, for the report."""
    name: str = ""
    """The image's name in its annotation file without extension; empty if it has none."""


def hash_layouts(layouts: Iterable[Layout]) -> str:
    """Return a short hash of what is asked for, in order: results of different questions must not mix."""
    digest = hashlib.sha256()
    for layout in layouts:
        lines = [[line.text, line.polygon, line.color, line.in_glyph_map] for line in layout.lines]
        digest.update(canonical_json([layout.layout_id, layout.size, lines]))
    return digest.hexdigest()[:16]


def palette_of(layouts: Iterable[Layout], most: int = 32) -> list[Color]:
    """Return the distinct colours that are asked for, or an empty list if they are none of a palette.

    Args:
        layouts: of one evaluation.
        most: colours that still count as a palette; more are arbitrary, and "nearest" would say nothing.
    """
    colors = sorted({line.color for layout in layouts for line in layout.lines if line.color is not None})
    return colors if 2 <= len(colors) <= most else []
