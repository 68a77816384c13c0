"""The two captions of an input: the image's, which the UNet reads, and the text's, which WriteNet reads.

Every random choice is keyed by (seed, input id, purpose).
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any

from common.seeding import rng

PLACEHOLDER = "*"
"""Stands for one rendered line in a text caption; its token's embedding is replaced."""
TEXT_PHRASES = (
    "Text says ",
    "Image with words ",
    "The picture reads ",
    "Captions are ",
    "Texts are ",
    "Text:  ",
)
MAX_CHARACTERS = 500
MAX_WORDS = 128

_WATERMARK_SCORE = 0.5
_SCRIPTS = (
    ("HIRAGANA", "Japanese"),
    ("KATAKANA", "Japanese"),
    ("HANGUL", "Korean"),
    ("CJK", "Chinese"),
    ("ARABIC", "Arabic"),
    ("DEVANAGARI", "Hindi"),
    ("BENGALI", "Bangla"),
)
"""First words of Unicode character names, in order of precedence: Japanese text holds CJK ideographs too."""


def describe_watermark(caption: str, wm_score: float | None) -> str:
    """Say in a caption whether the image bears a watermark, where a score is known."""
    if wm_score is None:
        return caption
    return caption + (" with watermarks " if wm_score > _WATERMARK_SCORE else " no watermarks ")


def image_caption(caption: str, *, suffix: str, seed: int, input_id: str) -> str:
    """Make the caption that conditions the image.

    Args:
        caption: of the image, its watermark phrase included; `*` in it becomes a space.
        suffix: appended after ", "; empty for none.
        seed: the run's.
        input_id: hash of the input's content.

    Returns:
        The caption, ". " appended, cut at 500 characters and 128 words, then the suffix.
    """
    ended = caption.replace(PLACEHOLDER, " ") + ". "
    cut = _cut(ended, seed, input_id)
    return f"{cut}, {suffix}" if suffix else cut


def _cut(caption: str, seed: int, input_id: str) -> str:
    """Keep the first sentence and, in random order, as many others as fit [truncate_string]."""
    caption = caption[:MAX_CHARACTERS]
    if len(caption.split()) <= MAX_WORDS:
        return caption
    first, *rest = (sentence.split() for sentence in caption.split("."))
    rng(seed, input_id, "caption cut").shuffle(rest)
    if len(first) >= MAX_WORDS:
        return " ".join(first[:MAX_WORDS])
    kept, room = [" ".join(first)], MAX_WORDS - len(first)
    for sentence in rest:
        if room == 0:
            break
        if sentence:
            shortened = [*sentence[:room], "."] if len(sentence) > room else sentence
            kept.append(" ".join(shortened))
            room -= min(len(sentence), room)
    return ". ".join(kept)


def text_caption(num_lines: int, *, seed: int, input_id: str) -> str:
    """Make the caption that announces the rendered lines, one placeholder each, e.g. "Text says * , * . "."""
    phrase = rng(seed, input_id, "caption phrase").choice(TEXT_PHRASES)
    return phrase + " , ".join([PLACEHOLDER] * num_lines) + " . "


@lru_cache(maxsize=1)
def _to_simplified() -> Any:
    from opencc import OpenCC

    return OpenCC("t2s")


def refine_language(language: str | None, text: str) -> str:
    """Name a line's language as upstream does.

    Args:
        language: as annotated, or None to tell it from the script.
        text: the line.

    Returns:
        `language`, but "Chinese" as "Chinese_tra" if simplification would change the text, else "Chinese_sim".
    """
    language = language or _language_of(text)
    if language != "Chinese":
        return language
    return "Chinese_sim" if _to_simplified().convert(text) == text else "Chinese_tra"


def _language_of(text: str) -> str:
    names = {unicodedata.name(character, "").partition(" ")[0] for character in text}
    return next((language for script, language in _SCRIPTS if script in names), "Latin")
