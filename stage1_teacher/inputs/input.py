"""What an input says, before anything is rendered: its caption, its lines, where its image lies.

Two kinds of trouble, the same for annotations and prompts: a file whose structure is wrong (not JSON, a field that
nobody knows) is a `DataError` before any work starts; an input whose values are wrong (no image, a two-point
polygon) is an `InputFailure`, which stage one records and passes over.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from common.errors import DataError

UNKNOWN_COLOR = (500.0, 500.0, 500.0)
"""How upstream writes a line's unknown colour; the network was trained on it, as on any other."""

Polygon = tuple[tuple[float, float], ...]
Mode = Literal["generate", "edit"]

ID_DIGITS = 32

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
_MAX_COORDINATE = 1e6
"""Pixels. OpenCV's fixed-point filling overflows far beyond any image."""


class InputFailure(DataError):
    """One input cannot be used; the others can.

    Attributes:
        reason: a short class of trouble by which failures are counted, e.g. "image missing".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class FontLacksCharacters(InputFailure):
    """No font that may render a line has all of its characters: counted apart, as one setting mends all of them.

    Attributes:
        characters: that are missing.
    """

    REASON = "font lacks characters"

    def __init__(self, characters: str, message: str) -> None:
        super().__init__(self.REASON, message)
        self.characters = characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of text to be rendered."""

    text: str
    """Not empty, no control characters."""
    polygon: Polygon
    """At least three corners, (x, y) in pixels of the image or frame."""
    language: str | None = None
    """As annotated; None if nobody said."""
    color: tuple[float, float, float] = UNKNOWN_COLOR
    """r, g, b in 0-255."""
    font: Path | None = None
    """Font file asked for; None for the configured one."""
    in_glyph_map: bool = True
    """Whether the glyph map shows it; False leaves its letters to its embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input."""

    where: str
    """File and entry, for messages."""
    input_id: str
    """Hash of what the annotation or prompt says, see `make_input_id`."""
    caption: str
    """Of the image, the watermark phrase included; may be empty."""
    lines: tuple[Line, ...]
    """All of them, also those beyond `inputs.max_lines`."""
    image: Path | None = None
    """Image file, checked to lie where it may; None if the input has none."""
    frame: tuple[float, float] | None = None
    """(width, height) in pixels that polygons refer to; None: the image's own."""
    mode: Mode | None = None
    """None: `inputs.edit_fraction` decides."""
    seed: int | None = None
    """Keys the input's noise; None: `precompute.seed`."""
    name: str = ""
    """The image's name as annotated; empty if there is none."""


def make_input_id(kind: str, value: Any) -> str:
    """Hash what an input says; where its file lies and what else is in that file do not matter.

    The image counts by the name that the annotation gives it: reading millions of images before the first one is
    solved would cost hours, in every task.

    Args:
        kind: how the value is read, so that equal values read differently have different ids.
        value: any JSON value, wrong ones included: an input that fails has an id too.

    Returns:
        32 hexadecimal digits.
    """
    text = _ENCODER.encode([kind, value])
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:ID_DIGITS]


def nearest(name: str, known: Collection[str]) -> str:
    """Say which known name was probably meant, as the end of a sentence."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"


def check_fields(value: dict[str, Any], known: Collection[str], where: str, ignored: Collection[str]) -> None:
    """Refuse a JSON object with a field that nobody reads.

    Raises:
        DataError: names the field and the nearest known one.
    """
    unknown = [field for field in value if field not in known and field not in ignored]
    if unknown:
        raise DataError(
            f"{where}: unknown field {unknown[0]!r}; {nearest(unknown[0], known)}"
            " (if it is harmless, add it to inputs.ignore_fields)"
        )


_INVISIBLE = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F),  # combining grapheme joiner
        (0x115F, 0x1160),  # Hangul fillers
        (0x17B4, 0x17B5),  # Khmer inherent vowels
        (0x180B, 0x180F),  # Mongolian variation selectors
        (0x2800, 0x2800),  # braille blank
        (0x3164, 0x3164),  # Hangul filler
        (0xFE00, 0xFE0F),  # variation selectors
        (0xFFA0, 0xFFA0),  # half-width Hangul filler
        (0xE0100, 0xE01EF),  # variation selectors
    )
    for code in range(first, last + 1)
)
"""Characters without ink that Unicode counts as letters or marks."""


def is_visible(character: str) -> bool:
    """Tell whether a character is meant to leave ink: no space, no mere control of how others look."""
    return not (character.isspace() or character in _INVISIBLE or unicodedata.category(character) in ("Cf", "Zs"))


def check(condition: object, reason: str, where: str, name: str, value: Any, expected: str) -> None:
    """Refuse a value of an input.

    Args:
        condition: what must hold.
        reason: the class of trouble.
        where: file and entry.
        name: of the value.
        value: as written.
        expected: what it should be.

    Raises:
        InputFailure: the condition does not hold.
    """
    if not condition:
        raise InputFailure(reason, f"{where}: {name} is {value!r:.40}, expected {expected}")


def check_text(text: Any, where: str) -> str:
    """Return a line's text in Unicode's composed form (NFC): what looks the same is the same.

    Raises:
        InputFailure: it is not a string, has nothing to see, or holds what cannot be rendered on one line.
    """
    check(isinstance(text, str), "bad text", where, "text", text, "a string")
    if not any(map(is_visible, text)):
        raise InputFailure("empty text", f"{where}: text is empty; remove the line")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise InputFailure("bad text", f"{where}: text {text!r:.40} holds the control character {character!r}")
    return unicodedata.normalize("NFC", text)


def check_caption(caption: Any, where: str) -> str:
    """Return a caption.

    Raises:
        InputFailure: it is not a string of Unicode characters.
    """
    check(isinstance(caption, str), "bad caption", where, "caption", caption, "a string")
    if not caption.isascii() and any(unicodedata.category(character) == "Cs" for character in caption):
        raise InputFailure("bad caption", f"{where}: caption holds a lone surrogate; it is not valid Unicode")
    return str(caption)


def is_number(value: Any) -> TypeGuard[float]:
    """Tell whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_polygon(polygon: Any, where: str) -> Polygon:
    """Return a polygon as pairs of numbers, four corners in an order in which no sides cross.

    Raises:
        InputFailure: it is no list of at least three different [x, y] pairs of finite numbers.
    """
    points = polygon if isinstance(polygon, list) else []
    if not points or not all(
        isinstance(point, list) and len(point) == 2 and all(map(is_number, point)) for point in points
    ):
        raise InputFailure(
            "bad polygon", f"{where}: polygon is {polygon!r:.60}, expected [[x, y], ...] of finite numbers"
        )
    checked = tuple((float(x), float(y)) for x, y in points)
    if max(abs(number) for point in checked for number in point) > _MAX_COORDINATE:
        raise InputFailure("bad polygon", f"{where}: polygon {polygon!r:.60} lies far outside any image")
    if len(set(checked)) < 3:
        raise InputFailure(
            "bad polygon", f"{where}: polygon has {len(set(checked))} different points, expected at least 3"
        )
    return _uncrossed(checked) if len(checked) == 4 else checked


def _uncrossed(corners: Polygon) -> Polygon:
    """Put four corners into an order in which no sides cross: left to right in both rows, say, is not one."""
    a, b, c, d = corners
    if _cross(a, b, c, d):
        return a, c, b, d
    if _cross(b, c, d, a):
        return a, b, d, c
    return corners


def _cross(*ends: tuple[float, float]) -> bool:
    """Tell whether the lines from the first point to the second and from the third to the fourth cross inside."""

    def side(p: tuple[float, float], q: tuple[float, float], r: tuple[float, float]) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    a, b, c, d = ends
    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def box_corners(box: Any, where: str) -> Polygon:
    """Return the corners of [x0, y0, x1, y1], clockwise from the top left.

    Raises:
        InputFailure: it is no such list, or empty.
    """
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise InputFailure("bad polygon", f"{where}: box is {box!r:.60}, expected [x0, y0, x1, y1]")
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        raise InputFailure("bad polygon", f"{where}: box {box} is empty; expected x0 < x1 and y0 < y1")
    return check_polygon([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], where)


def check_in_glyph_map(value: Any, where: str) -> bool:
    """Return whether the glyph map shows a line; it does where nobody says.

    Raises:
        InputFailure: it is neither true nor false.
    """
    check(value is None or isinstance(value, bool), "bad glyph_map", where, "glyph_map", value, "true or false")
    return value is not False


def check_color(color: Any, where: str) -> tuple[float, float, float]:
    """Return r, g, b of [r, g, b] in 0-255 (500 each for unknown) or "#rrggbb".

    Raises:
        InputFailure: it is neither.
    """
    if isinstance(color, str) and len(color) == 7 and color[0] == "#":
        try:
            channels = bytes.fromhex(color[1:])
        except ValueError:
            pass
        else:
            return float(channels[0]), float(channels[1]), float(channels[2])
    if isinstance(color, list) and len(color) == 3 and all(map(is_number, color)):
        red, green, blue = map(float, color)
        if (red, green, blue) == UNKNOWN_COLOR or 0 <= min(red, green, blue) <= max(red, green, blue) <= 255:
            return red, green, blue
    raise InputFailure("bad color", f'{where}: color is {color!r:.40}, expected [r, g, b] in 0-255 or "#rrggbb"')
