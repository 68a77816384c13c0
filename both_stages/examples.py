"""Requests to begin with, for the page and for exports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_EXAMPLES: tuple[tuple[str, str, tuple[tuple[str, str | None, tuple[float, ...]], ...]], ...] = (
    ("one sign", "a storefront with a sign", (("OPEN", "#d01818", (0.1, 0.2, 0.9, 0.5)),)),
    (
        "two lines, two colours",
        "a poster on a wall",
        (("CAFE", "#1838d0", (0.1, 0.1, 0.9, 0.42)), ("24H", "#d01818", (0.25, 0.55, 0.75, 0.9))),
    ),
    ("colour left to the model", "a wooden board", (("TAXI", None, (0.15, 0.3, 0.85, 0.65)),)),
    ("no text", "a street at night", ()),
)
"""Name, caption, lines of text, colour and box in parts of the image's side."""


def examples(size: int, fonts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the examples as the page takes them.

    Args:
        size: of the images, pixels.
        fonts: names of the configured ones; the first is used for the second line of each.
    """
    return [
        {
            "name": name,
            "caption": caption,
            "lines": [
                {
                    "text": text,
                    "color": color,
                    "font": fonts[0] if fonts and place else "",
                    "box": [round(part * size) for part in box],
                }
                for place, (text, color, box) in enumerate(lines)
            ],
        }
        for name, caption, lines in _EXAMPLES
    ]
