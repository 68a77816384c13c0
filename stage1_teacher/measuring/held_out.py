"""The held-out inputs of an evaluation: scanned once, rendered and encoded when their turn comes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.anytext2.conditioning import Conditioning
from common.config import Config
from common.errors import DataError, UsageError
from common.layouts import Color, Layout, Line
from common.progress import Progress
from stage1_teacher.inputs.annotations import ANYWORD_SIDE, WELL_OUTSIDE
from stage1_teacher.inputs.files import Inputs
from stage1_teacher.inputs.input import UNKNOWN_COLOR, Input, InputFailure
from stage1_teacher.measuring.ablations import leave_out
from stage1_teacher.recording.identity import describe_fonts
from stage1_teacher.rendering.rendered_input import RenderedInput, render_input
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.teacher import Teacher

logger = logging.getLogger(__name__)

MOST_ENCODED = 512
"""Encoded inputs kept for the next run; about 2.5 MB each at 512 px."""
BENCHMARK_MAX_LINES, BENCHMARK_MAX_CHARS = 20, 20
"""What AnyText-benchmark samples and scores of an image: its first lines, the first characters of each."""


def describe(input_: Input, rendered: RenderedInput) -> Layout:
    """Say what an input asks for, as it is rendered."""
    lines = zip(rendered.texts, rendered.polygons, rendered.colors.tolist(), rendered.in_glyph_map, strict=True)
    return Layout(
        layout_id=input_.input_id,
        size=rendered.size,
        lines=tuple(
            # A reader cannot see a space at an end, where a line was cut.
            Line(text=text.strip(), polygon=polygon, color=_asked_color(color), in_glyph_map=in_glyph_map)
            for text, polygon, color, in_glyph_map in lines
            if text.strip()
        ),
        caption=input_.caption,
        name=image_stem(input_.name),
    )


def describe_undrawn(input_: Input, side: int) -> Layout:
    """Say what an input asks for by AnyText-benchmark's rule: its first lines, each cut.

    Args:
        input_: read without its image.
        side: of the square that polygons refer to where the input_ does not say, pixels.
    """
    width, height = input_.frame or (side, side)
    return Layout(
        layout_id=input_.input_id,
        size=(round(height), round(width)),
        lines=tuple(
            Line(
                text=line.text[:BENCHMARK_MAX_CHARS],
                polygon=line.polygon,
                color=_asked_color(line.color),
                in_glyph_map=line.in_glyph_map,
            )
            for line in input_.lines[:BENCHMARK_MAX_LINES]
        ),
        caption=input_.caption,
        name=image_stem(input_.name),
    )


def _asked_color(color: Sequence[float]) -> Color | None:
    red, green, blue = color
    return None if (red, green, blue) == UNKNOWN_COLOR else (red, green, blue)


def image_stem(name: str) -> str:
    """Return an image's name up to its first dot, as AnyText-benchmark names generated images."""
    return PurePosixPath(name).name.split(".")[0]


def read_undrawn(inputs: Sequence[Input], frame: int = 0) -> list[Layout]:
    """Describe inputs by `describe_undrawn`.

    Args:
        inputs: without a frame where their image is not there.
        frame: side in pixels that these refer to; 0 for AnyWord's, which is then said.

    Raises:
        UsageError: their polygons show that it is another one.
    """
    side = frame or ANYWORD_SIDE
    unknown = [input_ for input_ in inputs if input_.frame is None]
    remedy = "put the annotated images into data_root, or give --set inputs.frame=SIDE"
    for input_ in unknown:
        reach = max((max(corner) for line in input_.lines for corner in line.polygon), default=0)
        if reach > WELL_OUTSIDE * side:
            raise UsageError(
                f"{input_.where}: a polygon reaches to {reach:g} pixels, expected at most {side}, as the annotated"
                f" image {input_.name!r} is not there to say its size; {remedy}"
            )
    if unknown and not frame:
        logger.warning(
            "%d of %d annotated images are not there: their polygons are taken to be in pixels of %d x %d; if they"
            " are not, %s",
            len(unknown),
            len(inputs),
            side,
            side,
            remedy,
        )
    return [describe_undrawn(input_, side) for input_ in inputs]


class HeldOut:
    """Held-out inputs by their ids."""

    def __init__(self, inputs: Inputs, settings: RenderSettings, count: int) -> None:
        """Render every input once, to see which can be used and what they ask for.

        Args:
            inputs: in order; one that says the same as an earlier one is left out.
            settings: how they are rendered.
            count: inputs wanted; the first ones that can be used are taken.

        Raises:
            DataError: none can be used.
        """
        self._settings = settings
        self._inputs_by_id: dict[str, Input] = {}
        self._encoded: dict[tuple[str, str], Conditioning] = {}
        self.layouts: list[Layout] = []
        """What the inputs ask for, in order."""
        self._ground_known: set[str] = set()
        self.failures: list[str] = []
        """Why others cannot be used."""
        equal: list[str] = []
        with Progress(min(count, len(inputs)), "held-out inputs", "input") as progress:
            for index in range(len(inputs)):
                if len(self.layouts) == count:
                    break
                try:
                    input_ = inputs[index]
                    if input_.input_id not in self._inputs_by_id:
                        self._add(input_)
                        progress.update()
                    else:
                        equal.append(input_.where)
                except InputFailure as failure:
                    self.failures.append(str(failure))
                    logger.warning("left out: %s", failure)
        if equal:
            logger.warning(
                "%d inputs say the same as an earlier one and are left out, first %s", len(equal), equal[0]
            )
        if not self.layouts:
            raise DataError(f"none of {len(inputs)} inputs can be used; the first: {self.failures[0]}")

    def _add(self, input_: Input) -> None:
        rendered = render_input(input_, self._settings)
        self.layouts.append(describe(input_, rendered))
        self._inputs_by_id[input_.input_id] = input_
        # In edit mode the image itself tells its ground.
        if rendered.image is not None and rendered.mode == "generate":
            self._ground_known.add(input_.input_id)

    def true_ground(self, input_id: str) -> NDArray[np.uint8] | None:
        """Return the true image if there is one and the caption alone tells its ground, else None.

        Only then does it say something that a rendered image's ground is like it.
        """
        return self.true_image(input_id) if input_id in self._ground_known else None

    def true_image(self, input_id: str) -> NDArray[np.uint8]:
        """Return an input's image, (H, W, 3) uint8 RGB, scaled to the size at which it is rendered.

        Raises:
            UsageError: it has none.
        """
        image = self.render(input_id).image
        if image is None:
            raise UsageError(
                f"{self._inputs_by_id[input_id].where}: there is no true image to read; leave --truth out"
            )
        pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
        return np.ascontiguousarray(pixels.numpy())

    @torch.no_grad()
    def reconstruct(self, teacher: Teacher, input_ids: Sequence[str]) -> Tensor:
        """Encode true images to latents, (B, C, h, w) float32."""
        images = [torch.from_numpy(self.true_image(name)).permute(2, 0, 1) for name in input_ids]
        batch = (torch.stack(images) / 127.5 - 1).to(teacher.device, teacher.dtype)  # (B, 3, H, W)
        return teacher.vae.encode(batch).float()

    def render(self, input_id: str) -> RenderedInput:
        """Render an input again; the same id gives the same rendering."""
        return render_input(self._inputs_by_id[input_id], self._settings)

    def encode(self, teacher: Teacher, input_ids: Sequence[str], without: str = "") -> list[Conditioning]:
        """Encode inputs, those not at hand in one batch.

        Args:
            teacher: encodes.
            input_ids: may repeat.
            without: what to leave out, see `ablations.split_parts`.
        """
        missing = [name for name in dict.fromkeys(input_ids) if (name, without) not in self._encoded]
        rendered = [leave_out(without, self.render(name)) for name in missing]
        fresh = dict(zip(missing, teacher.encode(rendered) if rendered else [], strict=True))
        found = [fresh.get(name) or self._encoded[name, without] for name in input_ids]
        for name, conditioning in fresh.items():
            if len(self._encoded) < MOST_ENCODED:
                self._encoded[name, without] = conditioning
        return found


def describe_settings(config: Config, settings: RenderSettings) -> dict[str, Any]:
    """Return what the rendering of held-out inputs depends on besides the inputs, as JSON values."""
    names = {"size", "edit_fraction", "max_lines", "max_chars", "use_images", "random_fonts"}
    return {  # under the names that these keys had first: evaluations begun before go on
        "precompute": {"seed": config.precompute.seed, **config.inputs.model_dump(include=names)},
        "teacher": {**config.teacher.model_dump(), "font_hint_prob": config.inputs.font_hint_prob},
        "fonts": describe_fonts(settings, digits=16),
    }
