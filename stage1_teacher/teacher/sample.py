"""Sampling with the teacher: prompts, typed or of a file, encoded, and a solve from noise on the trailing grid."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from common.anytext2.conditioning import Conditioning
from common.config import Config
from common.ddim import trailing_grid
from stage1_teacher.inputs.files import open_inputs
from stage1_teacher.inputs.fonts import configured_fonts
from stage1_teacher.inputs.input import Input
from stage1_teacher.inputs.prompt_text import prompt_from_text
from stage1_teacher.rendering.legibility import find_doubts
from stage1_teacher.rendering.rendered_input import RenderedInput, render_input
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.solver import solve
from stage1_teacher.teacher.teacher import Teacher

logger = logging.getLogger(__name__)

Size = tuple[int, int]
"""(W, H) of an image in pixels."""


def prompt_input(
    config: Config,
    text: str,
    boxes: Sequence[str | Sequence[float]],
    *,
    texts: Sequence[str] = (),
    colors: Sequence[str] = (),
    font: str | None = None,
    image: Path | None = None,
    size: Size | None = None,
) -> Input:
    """Read a prompt as a person types it, boxes in pixels of the image; see `prompt_from_text` for the others.

    Raises:
        UsageError: the prompt's parts do not match, or a value is wrong.
        InputFailure: no font has a text's characters, or the image cannot be read.
    """
    width, height = size or (config.inputs.size, config.inputs.size)
    fonts = configured_fonts(config)
    typed = prompt_from_text(
        text, boxes, size=height, texts=texts, fonts=fonts, colors=colors, font=font, image=image
    )
    return replace(typed, frame=(float(width), float(height)))


def read_prompts(config: Config, path: Path, size: Size | None = None) -> list[Input]:
    """Read a prompts file as precompute does, and see that each of its prompts can be rendered.

    Args:
        config: inputs, teacher and precompute are used.
        path: the JSONL file.
        size: of the images, in pixels; None for `inputs.size`. The square that boxes refer to is stretched to it.

    Raises:
        DataError: the file or one of its prompts is wrong.
    """
    settings = _settings(config, size)
    found = open_inputs((), (path,), config.inputs, settings.fonts)
    inputs = [found[index] for index in range(len(found))]
    for input_ in inputs:
        render_input(input_, settings)
    return inputs


def encode_input(
    config: Config, teacher: Teacher, input_: Input, size: Size | None = None
) -> tuple[Conditioning, RenderedInput]:
    """Render and encode an input as precompute does; what will hardly be seen as it is asked for is logged.

    Args:
        config: inputs, teacher and precompute are used.
        teacher: its encoders.
        input_: the input.
        size: of the image, in pixels; None for `inputs.size`.

    Raises:
        InputFailure: it cannot be rendered.
    """
    settings = _settings(config, size)
    rendered = render_input(input_, settings)
    for doubt in find_doubts(input_, settings, config.load_network().stride):
        logger.warning("%s: %s", input_.where, doubt)
    return teacher.encode([rendered])[0], rendered


def _settings(config: Config, size: Size | None) -> RenderSettings:
    settings = RenderSettings.from_config(config)
    return settings if size is None else replace(settings, size=size[1], width=size[0])


def sample_latents(
    config: Config, teacher: Teacher, conditioning: Conditioning, noise: Tensor, steps: int | None = None
) -> Tensor:
    """Solve the teacher's ODE on the trailing grid with the configured guidance.

    Args:
        config: precompute is used.
        teacher: the networks.
        conditioning: of all images.
        noise: (B, C, h, w).
        steps: of the solve; None for precompute.solver_steps.

    Returns:
        Latents, (B, C, h, w) float32.
    """
    rollout = solve(
        teacher,
        [conditioning] * len(noise),
        teacher.unconditional(),
        noise,
        trailing_grid(steps or config.precompute.solver_steps),
        guidance_scale=config.precompute.guidance_scale,
        keep=(),
        round_states=False,
    )
    return rollout.states[:, -1]
