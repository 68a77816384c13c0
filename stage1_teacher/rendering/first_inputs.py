"""A look at the first inputs before anything is loaded: what is wrong with many is wrong with the settings."""

from __future__ import annotations

from collections import Counter

from common.errors import UsageError
from stage1_teacher.inputs.files import Inputs
from stage1_teacher.inputs.input import FontLacksCharacters, InputFailure
from stage1_teacher.rendering.rendered_input import choose_lines
from stage1_teacher.rendering.settings import RenderSettings

LOOKED_AT = 1000
"""Inputs, the first ones."""
MOST_LACKING = 0.1
"""Share of them that may have lines that no font can render."""


def require_fonts(inputs: Inputs, settings: RenderSettings) -> None:
    """Refuse to begin where fonts are wrong for the inputs; no image is read.

    Raises:
        UsageError: more than a tenth of the first thousand inputs have a line whose characters no font has.
    """
    count = min(len(inputs), LOOKED_AT)
    failures = []
    for index in range(count):
        try:
            choose_lines(inputs[index], settings, frame=(1.0, 1.0))
        except FontLacksCharacters as failure:
            failures.append(failure)
        except InputFailure:
            pass  # fails when its turn comes, for a reason of its own
    if len(failures) <= MOST_LACKING * count:
        return
    missing = Counter(character for failure in failures for character in failure.characters)
    characters = " ".join(character for character, _ in missing.most_common(10))
    raise UsageError(
        f"{len(failures)} of the first {count} inputs have a line that no font can render, expected at most"
        f" {MOST_LACKING:.0%}; the characters that are missing most: {characters}; the first: {failures[0]}"
    )
