"""An evaluation: stage one's held-out inputs and teacher, stage two's students and measurement."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.anytext2.conditioning import ConditioningBatch, Uncond
from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.errors import UsageError
from common.layouts import Layout
from common.pictures import Picture
from common.signals import StopFlag
from stage1_teacher.inputs.annotations import caption_as_annotated
from stage1_teacher.inputs.files import open_inputs
from stage1_teacher.inputs.fonts import configured_fonts
from stage1_teacher.measuring.held_out import HeldOut, describe_settings, read_undrawn
from stage1_teacher.measuring.teacher_sampler import default_grids, teacher_samplers
from stage1_teacher.rendering.first_inputs import require_fonts
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.teacher import Teacher
from stage2_student.evaluation.image_folder import count_samples, folder_run, name_layouts
from stage2_student.evaluation.invocation import note_invocation
from stage2_student.evaluation.judges import load_judge
from stage2_student.evaluation.results import save_layouts
from stage2_student.evaluation.run_quality import TRUE_IMAGES, prepare_quality
from stage2_student.evaluation.runs import Job, Plan, Run, Sampled, evaluate_run
from stage2_student.evaluation.samplers import Sampler, StudentSampler, sampler_run
from stage2_student.evaluation.summary import summarise
from stage2_student.evaluation.table import Summary
from stage2_student.student.sample import decode

Prepared = tuple[Plan, dict[str, Any], list[Run]]
"""An evaluation about to begin: its plan, what all runs share besides the layouts as JSON values, and the runs."""
Networks = Callable[[], tuple[Teacher, Uncond]]
"""Loads the teacher once, when it is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be evaluated, on which inputs."""

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


def evaluate(config: Config, question: Question, out: Path, command: Sequence[str]) -> Summary:
    """Sample, read and score; go on where an earlier call on the same folder stopped.

    Args:
        config: model, teacher, inputs, precompute and evaluate are used.
        question: who samples what.
        out: the evaluation's folder.
        command: of this process, the program first; noted in the folder.

    Returns:
        What `evaluation.json` then has.

    Raises:
        UsageError: what is asked for does not fit together.
        DataError: the inputs, an adapter or a checkpoint is wrong, or the folder is of other settings.
        Stopped: a signal came; finished batches are on disk.
    """
    if question.images is not None:
        _check_scoring(config, question)
    elif question.no_teacher and question.grids:
        raise UsageError("received --teacher with --no-teacher, expected one of them; leave the other out")
    judge = load_judge(config.evaluate.judge)
    prepare = _prepare_drawing if question.images is None else _prepare_scoring
    plan, settings, runs = prepare(config, question)
    settings = {**settings, "samples_per_layout": plan.samples_per_layout, "judge": judge.identity}
    captions = {layout.layout_id: caption_as_annotated(layout.caption) for layout in plan.layouts}
    measure = prepare_quality(config, out, plan, captions, question.truth)
    save_layouts(out, plan.layouts, settings)
    note_invocation(out, command, config.as_dict())
    with StopFlag() as stop:
        for run in runs:
            evaluate_run(run, plan, judge, out, stop)
            if measure is not None:
                measure(run, stop)
    return summarise(out)


def named_path(text: str) -> tuple[str, Path]:
    """Split [NAME=]PATH; without a name it is the folder's."""
    name, equals, path = text.partition("=")
    if equals and name and "/" not in name:
        return name, Path(path)
    return Path(text).resolve().name, Path(text)


def _check_scoring(config: Config, question: Question) -> None:
    """Refuse what does not go with a folder of images."""
    samples = {
        "--truth": question.truth,
        "--adapter": question.adapters,
        "--teacher": question.grids,
        "--no-teacher": question.no_teacher,
        "--without": question.without,
    }
    if others := ", ".join(option for option, value in samples.items() if value):
        raise UsageError(
            f"--images {question.images}: received {others} too, expected none of these, as only the folder is"
            f" scored; leave {others} out, or leave --images out and give another --out"
        )
    if config.evaluate.fid_weights and not config.evaluate.fid_reference:
        raise UsageError(
            "evaluate.fid_weights: received no evaluate.fid_reference, expected one with --images, as there"
            " are no true images; give --set evaluate.fid_reference=FOLDER, or leave evaluate.fid_weights out"
        )


def _prepare_scoring(config: Config, question: Question) -> Prepared:
    """Prepare the scoring of images that someone else sampled."""
    images = question.images
    assert images is not None
    without_images = config.inputs.replace(use_images=False)
    opened = open_inputs(
        question.annotations, question.prompts, without_images, configured_fonts(config), measure_images=True
    )
    inputs = [opened[index] for index in range(len(opened))]  # one that fails: fewer would be another benchmark
    layouts = read_undrawn(inputs, config.inputs.frame)
    layouts = name_layouts(images, layouts, [input_.name for input_ in inputs])
    plan = _plan(config, layouts, samples_per_layout=count_samples(images, layouts))
    return plan, {}, [folder_run(images, images.resolve().name, plan.jobs())]


def _prepare_drawing(config: Config, question: Question) -> Prepared:
    """Prepare the teacher, the students and the true images of held-out inputs."""
    settings = RenderSettings.from_config(config)
    inputs = open_inputs(question.annotations, question.prompts, config.inputs, settings.fonts)
    require_fonts(inputs, settings)
    grids = () if question.no_teacher else question.grids or default_grids(config)
    held_out = HeldOut(inputs, settings, config.evaluate.num_samples)

    @functools.cache
    def load() -> tuple[Teacher, Uncond]:
        teacher = Teacher.load(config)
        return teacher, teacher.unconditional()

    def condition(ids: Sequence[str]) -> ConditioningBatch:
        return ConditioningBatch.stack(held_out.encode(load()[0], ids))

    samplers: list[Sampler] = [*teacher_samplers(config, held_out, load, grids, question.without)]
    samplers += [StudentSampler(config, path, name, condition) for name, path in question.adapters]
    plan = _plan(
        config,
        held_out.layouts,
        samples_per_layout=config.evaluate.samples_per_layout,
        truth=lambda layout: held_out.true_ground(layout.layout_id),
    )
    shared = {"inputs": describe_settings(config, settings), "seed": config.evaluate.seed}
    return plan, shared, _runs(config, held_out, load, samplers, question.truth)


def _plan(config: Config, layouts: Sequence[Layout], **more: Any) -> Plan:
    return Plan(
        layouts=layouts,
        batch_size=config.evaluate.batch_size,
        keep_images=config.evaluate.keep_images,
        keep_all=bool(config.evaluate.fid_weights or config.evaluate.clip_score_model),
        **more,
    )


def _runs(
    config: Config, held_out: HeldOut, load: Networks, samplers: Sequence[Sampler], truth: bool
) -> list[Run]:
    shape = config.load_network().latent_shape(config.inputs.size)

    def decode_latents(latents: Tensor) -> Sequence[Picture]:
        return decode(load()[0].vae, latents)

    def true_images(jobs: Sequence[Job]) -> Sampled:
        return Sampled(images=[held_out.true_image(layout.layout_id) for layout, _ in jobs])

    def through_vae(jobs: Sequence[Job]) -> Sampled:
        latents = held_out.reconstruct(load()[0], [layout.layout_id for layout, _ in jobs])
        return Sampled(images=decode_latents(latents))

    runs = []
    if truth:
        vae = {"teacher": fingerprint(config.find_checkpoint(), "teacher")}
        runs = [
            Run(label=TRUE_IMAGES, kind="truth", sample=true_images),
            Run(label="true images through the VAE", kind="vae", sample=through_vae, settings=vae),
        ]
    seed = config.evaluate.seed
    return runs + [sampler_run(sampler, seed=seed, shape=shape, decode=decode_latents) for sampler in samplers]
