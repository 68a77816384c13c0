"""What to sample, as Python says it: a caption with its texts and their places, or a record of a set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Union

from common.config import Config
from common.errors import UsageError

if TYPE_CHECKING:
    from stage1_teacher.inputs.input import Input


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLine:
    """A line of text in an image."""

    text: str
    """To show, as it is."""
    box: Sequence[float] | None = None
    """Where: x0, y0, x1, y1 in pixels of the image; or `polygon`."""
    polygon: Sequence[Sequence[float]] | None = None
    """Where: corners (x, y) in pixels of the image."""
    color: str | None = None
    """"#rrggbb"; None leaves it to the model."""
    font: str | None = None
    """A configured font's name, or a font file; None for inputs.font."""
    glyph_map: bool | None = None
    """False leaves the line out of the glyph map, so that its embedding alone says what it reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A caption, and which texts go where: as `lines`, or as a person types them, with `boxes` in a sentence."""

    text: str
    """The caption; the texts to show stand in it in quotation marks, unless `lines` or `texts` has them."""
    lines: Sequence[TextLine] | None = None
    """The texts, each with its place, colour and font, () for none; the four fields below are then left empty."""
    texts: Sequence[str] = ()
    """To show, as they are; no quotation mark in the sentence then means anything."""
    boxes: Sequence[str | Sequence[float]] = ()
    """Of each text x0, y0, x1, y1 in pixels of the image, as numbers or as "x0,y0,x1,y1"."""
    colors: Sequence[str] = ()
    """"#rrggbb" of each text, none at all, or one for all."""
    font: str | None = None
    """A configured font's name, or a font file."""
    image: Path | None = None
    """The image to edit; None generates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOf:
    """A record of a set of shards, for its conditioning."""

    shards: str
    """The set's folder or URL."""
    index: int
    """Of the record."""


What = Union[Prompt, RecordOf, "Input"]
"""That images are sampled from."""


def require_size(config: Config, size: tuple[int, int] | None) -> None:
    """Refuse a size of images that the network cannot have.

    Args:
        config: model and inputs are used.
        size: (W, H) in pixels; None for `inputs.size`.

    Raises:
        UsageError: a side is no multiple of the network's size_multiple.
    """
    multiple, usual = config.load_network().size_multiple, config.inputs.size
    if size is not None and any(side < multiple or side % multiple for side in size):
        raise UsageError(
            f"--size {size[0]}x{size[1]}: expected WIDTHxHEIGHT in multiples of {multiple}, e.g."
            f" {usual + multiple}x{usual}"
        )


def read_prompt(config: Config, prompt: Prompt, size: tuple[int, int] | None = None) -> Input:
    """Read a prompt as a person types it, before any network is loaded.

    Args:
        config: inputs is used.
        prompt: the prompt.
        size: (W, H) of the image to be, in pixels, to which its boxes refer; None for `inputs.size`.

    Raises:
        UsageError: its parts do not match, or a value is wrong.
    """
    from stage1_teacher.teacher.sample import prompt_input, prompt_of_lines

    if prompt.lines is not None:
        if prompt.texts or prompt.boxes or prompt.colors or prompt.font:
            raise UsageError(
                "a prompt has lines, or texts, boxes, colors and font: received both; give one of them"
            )
        lines = [{key: value for key, value in asdict(line).items() if value is not None} for line in prompt.lines]
        return prompt_of_lines(config, prompt.text, lines, image=prompt.image, size=size)
    return prompt_input(
        config,
        prompt.text,
        prompt.boxes,
        texts=prompt.texts,
        colors=prompt.colors,
        font=prompt.font,
        image=prompt.image,
        size=size,
    )


def read_prompts(config: Config, path: Path, size: tuple[int, int] | None = None) -> list[Input]:
    """Read a prompts file, JSON lines as precompute takes them, and see that each can be rendered.

    Args:
        config: inputs, teacher and precompute are used.
        path: the file.
        size: (W, H) of the images to be, in pixels; None for `inputs.size`.

    Raises:
        DataError: the file or one of its prompts is wrong.
    """
    from stage1_teacher.teacher.sample import read_prompts as read

    return read(config, path, size)
