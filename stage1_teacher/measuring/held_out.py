"""The held-out inputs of an evaluation: scanned once, drawn and encoded when their turn comes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.anytext2.conditioning import Conditioning
from common.config import Config
from common.errors import DataError, UsageError
from common.progress import Progress
from stage1_teacher.inputs.files import Inputs
from stage1_teacher.inputs.fonts import font_sha256
from stage1_teacher.inputs.input import UNKNOWN_COLOR, Content, InputFailure, Polygon
from stage1_teacher.rendering.rendered_input import DrawnInput, DrawSettings, draw_input
from stage1_teacher.teacher.teacher import Teacher

logger = logging.getLogger(__name__)

MOST_ENCODED = 512
"""Encoded inputs kept for the next run; about 2.5 MB each at 512 px."""
BENCHMARK_MAX_LINES, BENCHMARK_MAX_CHARS = 20, 20
"""What AnyText-benchmark draws and scores of an image: its first lines, the first characters of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What one held-out input asks for."""

    input_id: str
    name: str
    """Of its image, without folder and extension; empty if it has none."""
    caption: str
    """Of the image, as annotated."""
    texts: tuple[str, ...]
    """Lines with text, as drawn."""
    polygons: tuple[Polygon, ...]
    """In pixels of `size`."""
    colors: tuple[tuple[float, float, float] | None, ...]
    """r, g, b in 0-255; None where no colour is asked for."""
    in_glyph_map: tuple[bool, ...]
    """Which lines the glyph map shows."""
    size: tuple[int, int]
    """(H, W), pixels."""
    ground_is_told: bool
    """Whether there is a true image and the caption alone tells its ground: in edit mode the image itself does."""


def describe(content: Content, drawn: DrawnInput) -> Item:
    """Say what an input asks for, as it is drawn."""
    texts = [text.strip() for text in drawn.texts]  # a reader cannot see a space at an end, where a line was cut
    colors = [tuple(color) for color in drawn.colors.tolist()]
    kept = [place for place, text in enumerate(texts) if text]
    return Item(
        input_id=content.input_id,
        name=image_stem(content.name),
        caption=content.caption,
        texts=tuple(texts[place] for place in kept),
        polygons=tuple(drawn.polygons[place] for place in kept),
        colors=tuple(None if colors[place] == UNKNOWN_COLOR else _rgb(colors[place]) for place in kept),
        in_glyph_map=tuple(drawn.in_glyph_map[place] for place in kept),
        size=drawn.size,
        ground_is_told=drawn.image is not None and drawn.mode == "generate",
    )


def describe_undrawn(content: Content, side: int) -> Item:
    """Say what an input asks for by AnyText-benchmark's rule: its first lines, each cut.

    Args:
        content: read without its image.
        side: of the square that polygons refer to where the content does not say, pixels.
    """
    frame = side if content.frame is None else round(content.frame)
    lines = content.lines[:BENCHMARK_MAX_LINES]
    return Item(
        input_id=content.input_id,
        name=image_stem(content.name),
        caption=content.caption,
        texts=tuple(line.text[:BENCHMARK_MAX_CHARS] for line in lines),
        polygons=tuple(line.polygon for line in lines),
        colors=tuple(None if line.color == UNKNOWN_COLOR else line.color for line in lines),
        in_glyph_map=tuple(line.in_glyph_map for line in lines),
        size=(frame, frame),
        ground_is_told=False,
    )


def image_stem(name: str) -> str:
    """Return an image's name up to its first dot, as AnyText-benchmark names generated images."""
    return PurePosixPath(name).name.split(".")[0]


def read_undrawn(inputs: Inputs, side: int) -> list[Item]:
    """Describe all inputs by `describe_undrawn`.

    Raises:
        DataError: one is wrong: scoring fewer than all would be another benchmark.
    """
    return [describe_undrawn(inputs[index], side) for index in range(len(inputs))]


class HeldOut:
    """Held-out inputs by their ids."""

    def __init__(self, inputs: Inputs, settings: DrawSettings, count: int) -> None:
        """Draw every input once, to see which can be used and what they ask for.

        Args:
            inputs: in order; one that says the same as an earlier one is left out.
            settings: how they are drawn.
            count: inputs wanted; the first ones that can be used are taken.

        Raises:
            DataError: none can be used.
        """
        self._settings = settings
        self._contents: dict[str, Content] = {}
        self._encoded: dict[tuple[str, str], Conditioning] = {}
        self.items: list[Item] = []
        """What the inputs ask for, in order."""
        self.failures: list[str] = []
        """Why others cannot be used."""
        with Progress(min(count, len(inputs)), "held-out inputs", "input") as progress:
            for index in range(len(inputs)):
                if len(self.items) == count:
                    break
                try:
                    content = inputs[index]
                    if content.input_id not in self._contents:
                        self.items.append(describe(content, draw_input(content, settings)))
                        self._contents[content.input_id] = content
                        progress.update()
                except InputFailure as failure:
                    self.failures.append(str(failure))
                    logger.warning("left out: %s", failure)
        if not self.items:
            raise DataError(f"none of {len(inputs)} inputs can be used; the first: {self.failures[0]}")

    def true_image(self, input_id: str) -> NDArray[np.uint8]:
        """Return an input's image, (H, W, 3) uint8 RGB, scaled to the size at which it is drawn.

        Raises:
            UsageError: it has none.
        """
        image = self.draw(input_id).image
        if image is None:
            raise UsageError(
                f"{self._contents[input_id].where}: there is no true image to read; leave --truth out"
            )
        pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
        return np.ascontiguousarray(pixels.numpy())

    @torch.no_grad()
    def reconstruct(self, teacher: Teacher, input_ids: Sequence[str]) -> Tensor:
        """Encode true images to latents, (B, C, h, w) float32."""
        images = [torch.from_numpy(self.true_image(name)).permute(2, 0, 1) for name in input_ids]
        batch = (torch.stack(images) / 127.5 - 1).to(teacher.device, teacher.dtype)  # (B, 3, H, W)
        return teacher.vae.encode(batch).float()

    def draw(self, input_id: str) -> DrawnInput:
        """Draw an input again; the same id gives the same drawing."""
        return draw_input(self._contents[input_id], self._settings)

    def encode(self, teacher: Teacher, input_ids: Sequence[str], without: str = "") -> list[Conditioning]:
        """Encode inputs, those not at hand in one batch.

        Args:
            teacher: encodes.
            input_ids: may repeat.
            without: what to leave out, see `split_parts`.
        """
        missing = [name for name in dict.fromkeys(input_ids) if (name, without) not in self._encoded]
        drawn = [_leave_out(without, self.draw(name)) for name in missing]
        fresh = dict(zip(missing, teacher.encode(drawn) if drawn else [], strict=True))
        found = [fresh.get(name) or self._encoded[name, without] for name in input_ids]
        for name, conditioning in fresh.items():
            if len(self._encoded) < MOST_ENCODED:
                self._encoded[name, without] = conditioning
        return found


def _unchanged(drawn: DrawnInput) -> DrawnInput:
    return drawn


def _leave_out(without: str, drawn: DrawnInput) -> DrawnInput:
    for part in split_parts(without):
        drawn = ABLATIONS[part](drawn)
    return drawn


def _rgb(color: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = color
    return red, green, blue


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


def describe_settings(config: Config, settings: DrawSettings) -> dict[str, Any]:
    """Return what the drawing of held-out inputs depends on besides the inputs, as JSON values."""
    names = {"size", "edit_fraction", "max_lines", "max_chars", "use_images", "random_fonts"}
    return {  # under the names that these keys had first: evaluations begun before go on
        "precompute": {"seed": config.precompute.seed, **config.inputs.model_dump(include=names)},
        "teacher": {**config.teacher.model_dump(), "font_hint_prob": config.inputs.font_hint_prob},
        "fonts": {
            "default": font_sha256(settings.font)[:16],
            "named": {name: font_sha256(path)[:16] for name, path in sorted(settings.fonts.items())},
        },
    }


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
