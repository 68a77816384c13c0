"""What the page asks for, checked before any network sees it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from both_stages.prompts import Prompt, TextLine
from common.errors import UsageError

Number = Annotated[float, Field(ge=-1e6, le=1e6, strict=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request, and all of them together, may take."""

    max_bytes: int = 32 << 20
    """Of a request, the uploaded image included."""
    max_waiting: int = 8
    """Requests, the one that is sampled among them; more are turned away."""
    max_seconds: float = 300.0
    """That a request may sample; it is stopped between two calls of the UNet."""
    read_seconds: float = 30.0
    """That a request may take to arrive."""
    max_images: int = 4
    """Of a request, from each of its models."""
    max_steps: int = 100
    """Of the teacher."""
    max_lines: int = 30
    max_characters: int = 4000
    """Of a caption."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AskedLine(_Strict):
    """A line of text."""

    text: str = Field(max_length=200)
    box: tuple[Number, Number, Number, Number] = Field(strict=False)
    color: str | None = None
    font: str | None = None


class Asked(_Strict):
    """A request."""

    caption: str
    lines: list[AskedLine] = []
    image: str | None = None
    """The file to edit, base64; None generates."""
    models: list[str] = Field(min_length=1, max_length=2)
    """Names of those that sample, side by side."""
    steps: int | None = Field(default=None, ge=1)
    """Of the teacher."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    num_images: int = Field(default=1, ge=1)

    def prompt(self, upload: Path | None) -> Prompt:
        """Return the prompt.

        Args:
            upload: the file of `image`.
        """
        lines = [
            TextLine(text=line.text, box=line.box, color=line.color, font=line.font or None) for line in self.lines
        ]
        return Prompt(text=self.caption, lines=lines, image=upload)

    def image_bytes(self) -> bytes | None:
        """Return the uploaded file.

        Raises:
            UsageError: it is not base64.
        """
        if self.image is None:
            return None
        try:
            return base64.b64decode(self.image, validate=True)
        except (binascii.Error, ValueError):
            raise UsageError("image: received what is no base64; choose the file again") from None


def read_asked(body: bytes, limits: Limits, models: Collection[str], fonts: Collection[str]) -> Asked:
    """Read a request.

    Args:
        body: JSON.
        limits: that it must keep.
        models: names that it may ask for.
        fonts: likewise: a file's path is not taken from a browser.

    Raises:
        UsageError: it is wrong, or asks for too much.
    """
    try:
        asked = Asked.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part + 1) if isinstance(part, int) else part for part in first["loc"])
        raise UsageError(f"{where or 'request'}: {first['msg']}") from None
    for name, count, most in (
        ("images", asked.num_images, limits.max_images),
        ("steps", asked.steps or 1, limits.max_steps),
        ("lines", len(asked.lines), limits.max_lines),
        ("characters of the caption", len(asked.caption), limits.max_characters),
    ):
        if count > most:
            raise UsageError(f"{name}: received {count}, at most {most} here; ask for fewer")
    for model in asked.models:
        if model not in models:
            raise UsageError(f"models: received {model!r:.40}, expected some of {', '.join(models)}")
    for number, line in enumerate(asked.lines, start=1):
        if not line.text.strip():
            raise UsageError(f"line {number} has no text: write what it is to show, or remove it")
        if line.font and line.font not in fonts:
            raise UsageError(
                f"line {number}: font is {line.font!r:.40}, expected one of {', '.join(fonts) or 'none'}"
            )
    if not asked.caption.strip() and not asked.lines:
        raise UsageError("nothing to show: write a caption, or drag a box on the picture for a text")
    return asked
