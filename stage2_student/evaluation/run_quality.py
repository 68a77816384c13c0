"""FID and CLIP score of an evaluation's runs, from one evaluation's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from common.config import Config
from common.errors import UsageError
from common.signals import StopFlag
from stage2_student.evaluation.image_quality import (
    Reference,
    find_reference,
    kept_images,
    load_clip,
    load_fid,
    measure_quality,
)
from stage2_student.evaluation.runs import Plan, Run, run_folder

TRUE_IMAGES = "true images"
"""Label of the run that reads what was not sampled."""


def prepare_quality(
    config: Config, out: Path, plan: Plan, captions: Mapping[str, str], truth: bool
) -> Callable[[Run, StopFlag], None] | None:
    """Return what measures a finished run, or None if the weights of neither measure are given.

    Args:
        config: evaluate is used.
        out: the evaluation's folder.
        plan: what is sampled.
        captions: by layout id, for the CLIP score.
        truth: whether the true images are read in this evaluation.

    Raises:
        UsageError: FID has nothing to compare with.
        DataError: weights or reference images are missing or unreadable, which is seen before anything is sampled.
    """
    evaluation = config.evaluate
    if not evaluation.fid_weights and not evaluation.clip_score_model:
        return None
    weights, clip = evaluation.fid_weights, evaluation.clip_score_model
    fid_weights = config.resolve(weights, "evaluate.fid_weights") if weights else None
    clip_model = config.resolve(clip, "evaluate.clip_score_model") if clip else None
    real = _real_images(config, out, plan, truth)
    if fid_weights:
        load_fid(fid_weights)
    if clip_model:
        load_clip(clip_model)

    def measure(run: Run, stop: StopFlag) -> None:
        with_itself = run.label == TRUE_IMAGES and not isinstance(real, Reference)
        measure_quality(
            run_folder(out, run.label),
            plan,
            fid_weights=None if with_itself else fid_weights,
            clip_model=clip_model,
            real=real,
            captions=captions,
            stop=stop,
        )

    return measure


def _real_images(config: Config, out: Path, plan: Plan, truth: bool) -> Path | Reference:
    """Find what FID compares with: a reference folder, or else the run of the true images."""
    evaluation, truth_run = config.evaluate, run_folder(out, TRUE_IMAGES)
    if evaluation.fid_weights and evaluation.fid_reference:
        return find_reference(config.resolve(evaluation.fid_reference, "evaluate.fid_reference"))
    if evaluation.fid_weights and not truth:
        if not truth_run.exists():
            raise UsageError(
                "evaluate.fid_weights: FID compares with the true images; add --truth, or give"
                " evaluate.fid_reference, a folder of images"
            )
        kept_images(truth_run, plan)  # an incomplete set is refused before anything is sampled
    return truth_run
