"""Font files: found by name, opened once, at any size, always laid out the same way."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import ImageFont, features

from common.config import Config
from common.errors import DataError, reason
from common.faults import raise_disk_fault
from common.files import is_lfs_pointer, sha256_file
from stage1_teacher.inputs.input import (
    UNKNOWN_COLOR,
    InputFailure,
    Line,
    box_corners,
    check,
    check_color,
    check_in_glyph_map,
    check_polygon,
    check_text,
    is_visible,
    nearest,
)

logger = logging.getLogger(__name__)

_PROBE_SIZE = 32


@lru_cache(maxsize=1)
def text_layout() -> str:
    """Return how Pillow places characters on this machine: "raqm" (kerned and shaped) or "basic".

    Pillow has Raqm only where the system has libfribidi. Text rendered with the other layout differs, so the
    choice is part of a shard set's identity.
    """
    if features.check("raqm"):
        return "raqm"
    logger.warning(
        "text is rendered without kerning or shaping: Pillow finds no libfribidi (Debian: apt install libfribidi0)"
    )
    return "basic"


@lru_cache(maxsize=512)
def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Open a font at a pixel size.

    Args:
        path: a TrueType or OpenType file.
        size: em size in pixels, at least 1.

    Raises:
        DataError: the file is missing or no font.
    """
    engine = ImageFont.Layout.RAQM if text_layout() == "raqm" else ImageFont.Layout.BASIC
    try:
        return ImageFont.truetype(str(path), size=size, layout_engine=engine)
    except OSError as error:
        raise_disk_fault(error, path)
        if is_lfs_pointer(path):
            raise DataError(f"font {path} is a git-lfs pointer; fetch the font itself: git lfs pull") from None
        raise DataError(f"font {path}: {reason(error)}; expected a TrueType or OpenType file") from None


@lru_cache(maxsize=512)
def font_sha256(path: Path) -> str:
    """Return the SHA-256 of a font file, read once."""
    return sha256_file(path)


def configured_fonts(config: Config) -> dict[str, Path]:
    """Return the files of [inputs.fonts] by name.

    Raises:
        DataError: a file is missing.
    """
    return {name: config.resolve(path, f"inputs.fonts.{name}") for name, path in config.inputs.fonts.items()}


def fallback_fonts(config: Config, fonts: Mapping[str, Path]) -> tuple[Path, ...]:
    """Return the files of inputs.fallback_fonts, in order.

    Args:
        config: the configuration.
        fonts: configured font files by name.

    Raises:
        DataError: a file is missing.
    """
    names = config.inputs.fallback_fonts
    return tuple(fonts.get(name) or config.resolve(name, "inputs.fallback_fonts") for name in names)


def line_identity(line: Any, fields: Sequence[str], fonts: Mapping[str, Path], folder: Path) -> Any:
    """Return what a line of an input counts as: a font by its file's bytes, not by its name or path.

    Args:
        line: as written in the input; what is no object is returned as it is.
        fields: that matter.
        fonts: configured font files by name.
        folder: that other fonts' paths are relative to.
    """
    if not isinstance(line, dict):
        return line
    said = {name: line[name] for name in fields if name in line}
    return said | {"font": _font_identity(said["font"], fonts, folder)} if "font" in said else said


def read_line(line: dict[str, Any], fonts: Mapping[str, Path], folder: Path, where: str, reason: str) -> Line:
    """Check a line of an input.

    Args:
        line: as written in the input, with a polygon or a box.
        fonts: configured font files by name.
        folder: that other fonts' paths are relative to.
        where: for messages.
        reason: the class of trouble, where it has none of its own.

    Raises:
        InputFailure: a value is wrong.
    """
    language, color, font = line.get("language"), line.get("color"), line.get("font")
    check(language is None or isinstance(language, str), reason, where, "language", language, "a name")
    return Line(
        text=check_text(line.get("text"), where),
        polygon=check_polygon(line["polygon"], where) if "polygon" in line else box_corners(line["box"], where),
        language=language,
        color=UNKNOWN_COLOR if color is None else check_color(color, where),
        font=None if font is None else find_font(font, fonts, folder, where),
        in_glyph_map=check_in_glyph_map(line.get("glyph_map"), where),
    )


def _font_identity(font: Any, fonts: Mapping[str, Path], folder: Path) -> Any:
    path = _font_path(font, fonts, folder)
    try:
        return font if path is None else font_sha256(path)
    except OSError as error:  # `find_font` says why, when the input's turn comes
        raise_disk_fault(error, path or "")
        return font


def find_font(font: Any, fonts: Mapping[str, Path], folder: Path, where: str) -> Path:
    """Find the font that an input asks for, as a name in `fonts` or a path in `folder`.

    Raises:
        InputFailure: there is none of this name, or it is no font.
    """
    check(isinstance(font, str) and font, "bad font", where, "font", font, "a name or a path")
    path = _font_path(font, fonts, folder)
    if path is None:
        raise InputFailure(
            "bad font",
            f"{where}: font {font!r:.60} is no file and no font of [inputs.fonts];"
            f" {nearest(font, fonts) if fonts else 'that table is empty: add NAME = FILE to it'}",
        )
    try:
        load_font(path, _PROBE_SIZE)
    except DataError as error:
        raise InputFailure("bad font", f"{where}: {error}") from None
    return path


def _font_path(font: Any, fonts: Mapping[str, Path], folder: Path) -> Path | None:
    if not isinstance(font, str):
        return None
    path = fonts[font] if font in fonts else folder / font
    try:
        return path if path.is_file() else None
    except (OSError, ValueError) as error:  # a name that no file can have
        raise_disk_fault(error, path)
        return None


@lru_cache(maxsize=64)
def _unshaped(path: Path) -> ImageFont.FreeTypeFont:
    """Open a font so that one character is one glyph: shaping puts others beside a lone mark."""
    return ImageFont.truetype(str(path), size=_PROBE_SIZE, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=64)
def _missing_glyph(path: Path) -> bytes:
    return _ink(path, "\U0010ffff")  # a noncharacter: no font has it, so this is the "missing" box


def _ink(path: Path, character: str) -> bytes:
    mask = _unshaped(path).getmask(character)
    return bytes(mask) + repr(mask.size).encode()


@lru_cache(maxsize=65536)
def _has_character(path: Path, character: str) -> bool:
    if _ink(path, character) != _missing_glyph(path):
        return True
    shaped = text_layout() == "raqm"
    if not is_visible(character):  # shaping leaves it out, or makes its own space
        return shaped or not any(_unshaped(path).getmask(character))
    parts = unicodedata.normalize("NFD", character)
    return shaped and len(parts) > 1 and all(_has_character(path, part) for part in parts)


def missing_characters(path: Path, text: str) -> str:
    """Return a text's characters that a font would render as its "missing" box, each once."""
    return "".join(character for character in dict.fromkeys(text) if not _has_character(path, character))


def has_glyphs(path: Path, text: str) -> bool:
    """Tell whether a font has a glyph of its own for every character of a text."""
    return not missing_characters(path, text)
