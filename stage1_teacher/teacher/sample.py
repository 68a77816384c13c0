"""Sampling with the teacher: prompts, typed or of a file, encoded, and a solve from noise on the trailing grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from common.anytext2.conditioning import Conditioning
from common.config import Config
from common.ddim import trailing_grid
from common.errors import UsageError
from stage1_teacher.inputs.files import open_inputs
from stage1_teacher.inputs.fonts import configured_fonts
from stage1_teacher.inputs.input import Input, InputFailure, check_fields
from stage1_teacher.inputs.prompt_text import prompt_from_text
from stage1_teacher.inputs.prompts import LINE_FIELDS, parse_prompt
from stage1_teacher.rendering.legibility import find_doubts
from stage1_teacher.rendering.rendered_input import RenderedInput, render_input
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.solver import solve
from stage1_teacher.teacher.teacher import Teacher

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


def prompt_of_lines(
    config: Config,
    caption: str,
    lines: Sequence[Mapping[str, Any]],
    *,
    image: Path | None = None,
    size: Size | None = None,
) -> Input:
    """Read a prompt whose lines are said one by one, as in a prompts file.

    Args:
        config: inputs is used.
        caption: of the image; no quotation mark in it means anything.
        lines: with the fields of a prompts file's lines, boxes and polygons in pixels of the image.
        image: to edit; None generates.
        size: of the image, in pixels; None for `inputs.size`.

    Raises:
        UsageError: a value is wrong.
    """
    width, height = size or (config.inputs.size, config.inputs.size)
    fonts = configured_fonts(config)
    folder = Path.cwd() if image is None else image.resolve().parent
    said: list[dict[str, Any]] = []
    for place, line in enumerate(lines):
        written = dict(line)
        check_fields(written, LINE_FIELDS, f"lines[{place}]", ())
        if "box" in written:
            written["box"] = [float(number) for number in written["box"]]
        if "polygon" in written:
            written["polygon"] = [[float(x), float(y)] for x, y in written["polygon"]]
        if written.get("font") is not None and written["font"] not in fonts:
            written["font"] = str(Path(written["font"]).resolve())
        said.append(written)
    value: dict[str, Any] = {"caption": caption, "lines": said}
    if image is not None:
        value |= {"image": image.resolve().name, "mode": "edit"}
    try:
        read = parse_prompt(value, where="prompt", size=float(height), fonts=fonts, folder=folder)
    except InputFailure as error:
        raise UsageError(str(error)) from None
    return replace(read, frame=(float(width), float(height)))


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
) -> tuple[Conditioning, RenderedInput, list[str]]:
    """Render and encode an input as precompute does.

    Args:
        config: inputs, teacher and precompute are used.
        teacher: its encoders.
        input_: the input.
        size: of the image, in pixels; None for `inputs.size`.

    Returns:
        What the networks take, what was rendered, and what will hardly be seen as it is asked for, a line each.

    Raises:
        InputFailure: it cannot be rendered.
    """
    settings = _settings(config, size)
    rendered = render_input(input_, settings)
    doubts = find_doubts(input_, settings, config.load_network().stride)
    return teacher.encode([rendered])[0], rendered, doubts


def _settings(config: Config, size: Size | None) -> RenderSettings:
    settings = RenderSettings.from_config(config)
    return settings if size is None else replace(settings, size=size[1], width=size[0])


def sample_latents(
    config: Config,
    teacher: Teacher,
    conditionings: Sequence[Conditioning],
    noise: Tensor,
    steps: int | None = None,
) -> Tensor:
    """Solve the teacher's ODE on the trailing grid with the configured guidance.

    Args:
        config: precompute is used.
        teacher: the networks.
        conditionings: B of them, of one image size.
        noise: (B, C, h, w).
        steps: of the solve; None for precompute.solver_steps.

    Returns:
        Latents, (B, C, h, w) float32.
    """
    rollout = solve(
        teacher,
        conditionings,
        teacher.unconditional(),
        noise,
        trailing_grid(steps or config.precompute.solver_steps),
        guidance_scale=config.precompute.guidance_scale,
        keep=(),
        round_states=False,
    )
    return rollout.states[:, -1]
