"""Parts of AnyText2 that an evaluation can leave out, to see what each is good for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from common.errors import UsageError
from stage1_teacher.inputs.input import UNKNOWN_COLOR
from stage1_teacher.rendering.rendered_input import DrawnInput


def _unchanged(drawn: DrawnInput) -> DrawnInput:
    return drawn


ABLATIONS: dict[str, Callable[[DrawnInput], DrawnInput]] = {
    "caption": lambda drawn: replace(drawn, caption=""),
    "color": lambda drawn: replace(drawn, colors=torch.full_like(drawn.colors, UNKNOWN_COLOR[0])),
    "glyph-embedding": lambda drawn: replace(
        drawn, glyph_lines=torch.zeros_like(drawn.glyph_lines), font_hint=torch.zeros_like(drawn.font_hint)
    ),
    "glyph-map": lambda drawn: replace(drawn, glyphs=torch.zeros_like(drawn.glyphs)),
    "writenet": _unchanged,  # these two are left out of the network, not of its input
    "attnx": _unchanged,
}
"""Parts of AnyText2 without which an evaluation can be run, and what each changes in an input."""


def split_parts(without: str) -> list[str]:
    """Split parts to leave out together, joined by "+", and sort them; none of an empty name.

    Raises:
        UsageError: one is not in `ABLATIONS`, or comes twice.
    """
    parts = sorted(without.split("+")) if without else []
    for part in parts:
        if part not in ABLATIONS:
            known = ", ".join(sorted(ABLATIONS))
            raise UsageError(
                f"--without {without}: received {part!r}, expected one of {known}, or several joined by +"
            )
    if len(set(parts)) < len(parts):
        raise UsageError(f"--without {without}: received a part twice, expected different ones")
    return parts


def leave_out(without: str, drawn: DrawnInput) -> DrawnInput:
    """Take parts out of an input.

    Args:
        without: as `split_parts` takes it; empty leaves the input as it is.
        drawn: stays as it is.
    """
    for part in split_parts(without):
        drawn = ABLATIONS[part](drawn)
    return drawn
