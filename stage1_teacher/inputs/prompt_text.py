"""A prompt as a person types it: a sentence with the texts in quotation marks, or beside it, and a box for each.

Texts are found between "...", “...” or «...». Where the sentence has such marks for something else (a 5" pipe), or
the image is to show a mark, the texts are given beside it, and no mark in the sentence means anything.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UsageError
from stage1_teacher.inputs.input import Input, InputFailure
from stage1_teacher.inputs.prompts import parse_prompt

logger = logging.getLogger(__name__)

MARKS = '"...", “...” or «...»'
"""That count as quotation marks, for messages."""
_QUOTED = re.compile('"([^"]*)"|“([^”]*)”|«([^»]*)»')


def prompt_from_text(
    prompt: str,
    boxes: Sequence[str | Sequence[float]],
    *,
    size: int,
    texts: Sequence[str] = (),
    fonts: Mapping[str, Path] | None = None,
    colors: Sequence[str] = (),
    font: str | None = None,
    image: Path | None = None,
    seed: int | None = None,
) -> Input:
    """Read a sentence such as 'a sign that says "OPEN" and "24H"', with one box for each quoted text.

    Args:
        prompt: the sentence; it is also the image's caption, as it stands.
        boxes: x0, y0, x1, y1 in pixels of the image, as numbers or as "x0,y0,x1,y1", one for each text, in order.
        size: side of the image in pixels.
        texts: to show, as they are; none: those that the sentence quotes.
        fonts: configured font files by name.
        colors: "#rrggbb" for each text, none at all, or one for all.
        font: a configured font's name or a font file, for all texts.
        image: the image to edit; None generates.
        seed: keys the noise; None for the configured one.

    Raises:
        UsageError: the number of texts, boxes and colours do not match, or a value is wrong.
    """
    found = list(texts) or quoted_texts(prompt, boxed=len(boxes) > 0)
    where = "--text" if texts else f"the prompt, between {MARKS}"
    if len(found) != len(boxes):
        raise UsageError(
            f"received {len(found)} texts from {where} ({_listed(found)}) and {len(boxes)} boxes, expected as"
            " many: give one --box x0,y0,x1,y1 for each, or the texts themselves as one --text beside each --box"
        )
    if len(colors) not in (0, 1, len(found)):
        raise UsageError(f"{len(colors)} colours for {len(found)} texts; give one for each, one for all, or none")
    if not found and (colors or font is not None):
        raise UsageError(f"--color or --font: no text to use it for; found none in {where}; leave it out")
    logger.info("texts, from %s: %s", where, _listed(found))
    lines: list[dict[str, Any]] = []
    for place, (text, box) in enumerate(zip(found, boxes, strict=True)):
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


def quoted_texts(prompt: str, *, boxed: bool) -> list[str]:
    """Return the texts that stand in a sentence between quotation marks.

    Args:
        prompt: the sentence.
        boxed: whether texts are expected at all; else a mark alone is no more than that.

    Raises:
        UsageError: a mark is left over, or a text begins or ends with a space: marks were taken for quotation
            marks that are none.
    """
    texts = [next(filter(None, groups), "") for groups in _QUOTED.findall(prompt)]
    rest = [mark for mark in _QUOTED.sub("", prompt) if mark in '"“”«»']
    if rest and (boxed or texts):
        trouble = f"the mark {rest[0]} stands without its other half"
    elif loose := [text for text in texts if text != text.strip()]:
        trouble = f"the text {_listed(loose[:1])} begins or ends with a space, as between marks that quote nothing"
    else:
        return texts
    raise UsageError(
        f"prompt {prompt!r}: {trouble}; found {_listed(texts)} between {MARKS}; give the texts themselves as one"
        " --text beside each --box"
    )


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(map(repr, texts)) or "none"


def _numbers(box: str | Sequence[float]) -> list[float]:
    try:  # 8 and "8" are one input, of one id
        return [float(number) for number in (box.split(",") if isinstance(box, str) else box)]
    except ValueError:
        raise UsageError(f"--box {box}: expected x0,y0,x1,y1 in pixels, e.g. --box 76,75,436,165") from None
