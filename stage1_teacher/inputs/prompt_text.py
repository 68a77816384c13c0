"""A prompt as a person types it: a sentence with the texts in quotation marks, and a box for each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UsageError
from stage1_teacher.inputs.input import Input, InputFailure
from stage1_teacher.inputs.prompts import parse_prompt

_QUOTED = re.compile('"([^"]*)"|“([^”]*)”|«([^»]*)»')


def prompt_from_text(
    prompt: str,
    boxes: Sequence[str | Sequence[float]],
    *,
    size: int,
    fonts: Mapping[str, Path] | None = None,
    colors: Sequence[str] = (),
    font: str | None = None,
    image: Path | None = None,
    seed: int | None = None,
) -> Input:
    """Read a sentence such as 'a sign that says "OPEN" and "24H"', with one box for each quoted text.

    Args:
        prompt: the sentence; it is also the image's caption, as it stands.
        boxes: x0, y0, x1, y1 in pixels of the image, as numbers or as "x0,y0,x1,y1", one for each quoted text, in
            order.
        size: side of the image in pixels.
        fonts: configured font files by name.
        colors: "#rrggbb" for each text, none at all, or one for all.
        font: a configured font's name or a font file, for all texts.
        image: the image to edit; None generates.
        seed: keys the noise; None for the configured one.

    Raises:
        UsageError: the number of texts, boxes and colours do not match, or a value is wrong.
    """
    texts = [next(filter(None, groups), "") for groups in _QUOTED.findall(prompt)]
    if len(texts) != len(boxes):
        raise UsageError(
            f"prompt has {len(texts)} quoted texts and {len(boxes)} boxes; give one --box x0,y0,x1,y1 for each"
        )
    if len(colors) not in (0, 1, len(texts)):
        raise UsageError(f"{len(colors)} colours for {len(texts)} texts; give one for each, one for all, or none")
    lines: list[dict[str, Any]] = []
    for place, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        line: dict[str, Any] = {"text": text, "box": _numbers(box)}
        if colors:
            line["color"] = colors[place % len(colors)]
        if font is not None:
            line["font"] = font if font in (fonts or {}) else str(Path(font).resolve())
        lines.append(line)
    value: dict[str, Any] = {"caption": prompt, "lines": lines}
    if seed is not None:
        value["seed"] = seed
    folder = Path.cwd()
    if image is not None:
        folder = image.resolve().parent
        value |= {"image": image.resolve().name, "mode": "edit"}
    try:
        return parse_prompt(value, where="prompt", size=float(size), fonts=fonts or {}, folder=folder)
    except InputFailure as error:
        raise UsageError(str(error)) from None


def _numbers(box: str | Sequence[float]) -> list[float]:
    try:  # 8 and "8" are one input, of one id
        return [float(number) for number in (box.split(",") if isinstance(box, str) else box)]
    except ValueError:
        raise UsageError(f"--box {box}: expected x0,y0,x1,y1 in pixels, e.g. --box 76,75,436,165") from None
