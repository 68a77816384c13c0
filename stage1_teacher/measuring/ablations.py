"""Parts of AnyText2 that an evaluation can leave out, to see what each is good for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from common.errors import UsageError
from stage1_teacher.inputs.input import UNKNOWN_COLOR
from stage1_teacher.rendering.rendered_input import RenderedInput


def _unchanged(rendered: RenderedInput) -> RenderedInput:
    return rendered


ABLATIONS: dict[str, Callable[[RenderedInput], RenderedInput]] = {
    "caption": lambda rendered: replace(rendered, caption=""),
    "color": lambda rendered: replace(rendered, colors=torch.full_like(rendered.colors, UNKNOWN_COLOR[0])),
    "glyph-embedding": lambda rendered: replace(
        rendered,
        glyph_lines=torch.zeros_like(rendered.glyph_lines),
        font_hint=torch.zeros_like(rendered.font_hint),
    ),
    "glyph-map": lambda rendered: replace(rendered, glyphs=torch.zeros_like(rendered.glyphs)),
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


def leave_out(without: str, rendered: RenderedInput) -> RenderedInput:
    """Take parts out of an input.

    Args:
        without: as `split_parts` takes it; empty leaves the input as it is.
        rendered: stays as it is.
    """
    for part in split_parts(without):
        rendered = ABLATIONS[part](rendered)
    return rendered
