"""What both kinds of evaluation are composed of: the one of inputs, and the one of a recorded set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.anytext2.conditioning import Conditioning, ConditioningBatch, Uncond
from common.config import Config
from common.layouts import Layout
from common.pictures import Picture
from common.signals import StopFlag
from stage1_teacher.teacher.teacher import Teacher
from stage2_student.evaluation.runs import Plan, Run
from stage2_student.evaluation.samplers import DrawNoise, StudentSampler, draw_noise

Decode = Callable[[Tensor], Sequence[Picture]]
"""Latents (B, C, h, w) to pictures."""
Encode = Callable[[Sequence[str]], list[Conditioning]]
"""Ids of inputs to what the teacher is given of them."""
Networks = Callable[[], tuple[Teacher, Uncond]]
"""Loads the teacher once, when it is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be evaluated, and on what: inputs, a folder of images, or a recorded set."""

    annotations: tuple[Path, ...] = ()
    """AnyWord json files."""
    prompts: tuple[Path, ...] = ()
    """Prompts JSONL files."""
    grids: tuple[str, ...] = ()
    """Of the teacher, like "upstream:20"; empty for the usual ones."""
    no_teacher: bool = False
    """Leave the teacher out, but for what `without` asks for."""
    adapters: tuple[tuple[str, Path], ...] = ()
    """Students: a name for the tables, and a run's folder, a checkpoint, an adapter's folder, or an export."""
    truth: bool = False
    """Whether to read the true images too, and these through the VAE."""
    without: tuple[str, ...] = ()
    """What to leave out of the teacher, each as `ablations.split_parts` takes it."""
    images: Path | None = None
    """Score this folder's images, and sample nothing."""
    held_out: str | None = None
    """A set's folder or URL: its records are what is sampled, from their recorded noise."""
    trajectories: Path | None = None
    """Folder of that set's whole rollouts, to measure states on the way too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An evaluation about to begin."""

    plan: Plan
    """What all runs sample."""
    settings: dict[str, Any]
    """What all runs share besides the layouts, as JSON values."""
    runs: Sequence[Run]
    """Who samples."""
    first: Callable[[StopFlag], None] | None = None
    """To be done before the runs: the solves that they are measured against."""


def make_plan(config: Config, layouts: Sequence[Layout], **more: Any) -> Plan:
    """Return the plan of layouts by what [evaluate] says."""
    return Plan(
        layouts=layouts,
        batch_size=config.evaluate.batch_size,
        keep_images=config.evaluate.keep_images,
        keep_all=bool(config.evaluate.fid_weights or config.evaluate.clip_score_model),
        **more,
    )


def own_noise(config: Config) -> DrawNoise:
    """Return the noise that an evaluation draws itself, keyed by evaluate.seed, the input's id and the image."""
    shape = config.load_network().latent_shape(config.inputs.size)
    return lambda jobs, count: draw_noise(config.evaluate.seed, jobs, shape, count)


def students(config: Config, question: Question, encode: Encode) -> list[StudentSampler]:
    """Return the students that are asked for.

    Raises:
        DataError: there is no adapter.
    """

    def condition(ids: Sequence[str]) -> ConditioningBatch:
        return ConditioningBatch.stack(encode(ids))

    return [StudentSampler(config, path, name, condition) for name, path in question.adapters]
