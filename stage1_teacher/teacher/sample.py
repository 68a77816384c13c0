"""Sampling with the teacher: a typed prompt encoded, and a solve from noise on the trailing grid."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from common.anytext2.conditioning import Conditioning
from common.config import Config
from common.ddim import trailing_grid
from stage1_teacher.inputs.prompt_text import prompt_from_text
from stage1_teacher.rendering.legibility import find_doubts
from stage1_teacher.rendering.rendered_input import RenderSettings, render_input
from stage1_teacher.teacher.solver import solve
from stage1_teacher.teacher.teacher import Teacher

logger = logging.getLogger(__name__)


def encode_prompt(
    config: Config,
    teacher: Teacher,
    text: str,
    boxes: Sequence[str | Sequence[float]],
    *,
    colors: Sequence[str] = (),
    font: str | None = None,
    image: Path | None = None,
) -> Conditioning:
    """Render and encode a prompt as precompute does; see `prompt_from_text` for the arguments.

    What will hardly be seen as it is asked for is logged.

    Raises:
        UsageError: the prompt's parts do not match, or a value is wrong.
        InputFailure: no font has a text's characters, or the image cannot be read.
    """
    settings = RenderSettings.from_config(config)
    content = prompt_from_text(
        text, boxes, size=settings.size, fonts=settings.fonts, colors=colors, font=font, image=image
    )
    for doubt in find_doubts(content, settings, config.load_network().stride):
        logger.warning("%s", doubt)
    return teacher.encode([render_input(content, settings)])[0]


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
