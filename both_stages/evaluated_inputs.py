"""An evaluation of inputs: teacher, students and true images, from noise of the evaluation's own.

Every run is measured against the teacher's own solve of the same noise, which is made once and kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from both_stages.evaluation_parts import (
    Decode,
    Encode,
    Networks,
    Prepared,
    Question,
    make_plan,
    own_noise,
    students,
)
from common.anytext2.conditioning import Conditioning, Uncond
from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.pictures import Picture
from common.regions import text_cells
from stage1_teacher.inputs.files import open_inputs
from stage1_teacher.measuring.held_out import HeldOut, describe_settings
from stage1_teacher.measuring.teacher_sampler import (
    TeacherSampler,
    default_grids,
    recorded_grid,
    teacher_samplers,
)
from stage1_teacher.rendering.first_inputs import require_fonts
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.teacher import Teacher
from stage2_student.evaluation.detector import load_detector
from stage2_student.evaluation.run_quality import TRUE_IMAGES
from stage2_student.evaluation.runs import Job, Run, Sampled
from stage2_student.evaluation.samplers import DrawNoise, Sampler, sampler_run
from stage2_student.evaluation.solves import EndpointMeasure, KeptSolves
from stage2_student.student.sample import decode


def prepare_inputs(config: Config, question: Question, out: Path) -> Prepared:
    """Prepare teacher, students and the true images of inputs, from noise keyed by evaluate.seed.

    Args:
        config: model, teacher, inputs, precompute and evaluate are used.
        question: who samples, and which inputs.
        out: the evaluation's folder, which keeps the solves that runs are measured against.

    Raises:
        UsageError: an option, or a setting, is wrong.
        DataError: the inputs, an adapter or a checkpoint is.
    """
    rendering = RenderSettings.from_config(config)
    inputs = open_inputs(question.annotations, question.prompts, config.inputs, rendering.fonts)
    require_fonts(inputs, rendering)
    held_out = HeldOut(inputs, rendering, config.evaluate.num_samples)

    @functools.cache
    def load() -> tuple[Teacher, Uncond]:
        teacher = Teacher.load(config)
        return teacher, teacher.unconditional()

    def encode(ids: Sequence[str]) -> list[Conditioning]:
        return held_out.encode(load()[0], ids)

    def decode_latents(latents: Tensor) -> Sequence[Picture]:
        return decode(load()[0].vae, latents)

    grids = () if question.no_teacher else question.grids or default_grids(config)
    samplers: list[Sampler] = [*teacher_samplers(config, held_out, load, grids, question.without)]
    samplers += students(config, question, encode)
    plan = make_plan(
        config,
        held_out.layouts,
        samples_per_layout=config.evaluate.samples_per_layout,
        detector=load_detector(),
        truth=lambda layout: held_out.true_ground(layout.layout_id),
    )
    settings = {"inputs": describe_settings(config, rendering), "seed": config.evaluate.seed}
    images = _true_runs(config, held_out, load, decode_latents) if question.truth else []
    noise = own_noise(config)
    if not config.evaluate.endpoint_error:
        runs = [
            sampler_run(one, seed=config.evaluate.seed, noise_of=noise, decode=decode_latents) for one in samplers
        ]
        return Prepared(plan=plan, settings=settings, runs=[*images, *runs])
    (solver,) = teacher_samplers(config, held_out, load, [recorded_grid(config)], ())
    settings["solve"] = {**solver.settings, "record_every": solver.record_every}
    solves = KeptSolves(out, solve=_solve_with(solver, noise), cells=_cells_of(encode))
    solving = any(_is_solver(sampler) for sampler in samplers)
    return Prepared(
        plan=plan,
        settings=settings,
        runs=[*images, *_measured(config, samplers, noise, decode_latents, solves)],
        first=None if solving else lambda stop: solves.fill(plan.jobs(), plan.batch_size, stop),
    )


def _measured(
    config: Config, samplers: Sequence[Sampler], noise: DrawNoise, decode_latents: Decode, solves: KeptSolves
) -> list[Run]:
    """Return the runs of samplers, first the one whose solves the others are measured against."""
    measure = EndpointMeasure(solves, decode_latents)
    return [
        sampler_run(
            sampler,
            seed=config.evaluate.seed,
            noise_of=noise,
            decode=decode_latents,
            measure=measure,
            keep=solves.keep if _is_solver(sampler) else None,
        )
        for sampler in sorted(samplers, key=lambda sampler: not _is_solver(sampler))
    ]


def _is_solver(sampler: Sampler) -> bool:
    """Tell whether a sampler makes the solves that others are measured against."""
    return isinstance(sampler, TeacherSampler) and sampler.record_every > 0


def _solve_with(solver: TeacherSampler, noise: DrawNoise) -> Callable[[Sequence[Job]], Tensor]:
    def solve(jobs: Sequence[Job]) -> Tensor:
        return solver.latents(solver.prepare([layout.layout_id for layout, _ in jobs]), noise(jobs, 1))

    return solve


def _cells_of(encode: Encode) -> Callable[[Sequence[Job]], Tensor]:
    def cells(jobs: Sequence[Job]) -> Tensor:
        found = encode([layout.layout_id for layout, _ in jobs])
        height, width = found[0].masked_latents.shape[-2:]
        return text_cells(torch.stack([one.positions for one in found]), (height, width))

    return cells


def _true_runs(config: Config, held_out: HeldOut, load: Networks, decode_latents: Decode) -> list[Run]:
    def true_images(jobs: Sequence[Job]) -> Sampled:
        return Sampled(images=[held_out.true_image(layout.layout_id) for layout, _ in jobs])

    def through_vae(jobs: Sequence[Job]) -> Sampled:
        latents = held_out.reconstruct(load()[0], [layout.layout_id for layout, _ in jobs])
        return Sampled(images=decode_latents(latents))

    vae = {"teacher": fingerprint(config.find_checkpoint(), "teacher")}
    return [
        Run(label=TRUE_IMAGES, kind="truth", sample=true_images),
        Run(label="true images through the VAE", kind="vae", sample=through_vae, settings=vae),
    ]
