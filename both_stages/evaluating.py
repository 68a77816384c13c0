"""An evaluation: stage one's held-out inputs and teacher, stage two's students and measurement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from both_stages.evaluated_inputs import prepare_inputs
from both_stages.evaluated_set import prepare_set
from both_stages.evaluation_parts import Prepared, Question, make_plan
from common.config import Config
from common.errors import DataError, UsageError
from common.signals import StopFlag
from stage1_teacher.inputs.annotations import caption_as_annotated
from stage1_teacher.inputs.files import open_inputs
from stage1_teacher.inputs.fonts import configured_fonts
from stage1_teacher.measuring.held_out import read_undrawn
from stage2_student.evaluation.image_folder import count_samples, folder_run, name_layouts
from stage2_student.evaluation.invocation import note_invocation
from stage2_student.evaluation.judges import load_judge
from stage2_student.evaluation.results import LAYOUTS_FILE, load_layouts, save_layouts
from stage2_student.evaluation.run_quality import prepare_quality
from stage2_student.evaluation.runs import evaluate_run
from stage2_student.evaluation.summary import summarise
from stage2_student.evaluation.table import Summary


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
    _check(config, question)
    judge = load_judge(config.evaluate.judge)
    prepared = _prepare(config, question, out)
    plan = prepared.plan
    settings = {**prepared.settings, "samples_per_layout": plan.samples_per_layout, "judge": judge.identity}
    _require_same_solves(out, settings)
    captions = {layout.layout_id: caption_as_annotated(layout.caption) for layout in plan.layouts}
    measure = prepare_quality(config, out, plan, captions, question.truth)
    save_layouts(out, plan.layouts, settings)
    note_invocation(out, command, config.as_dict())
    with StopFlag() as stop:
        if prepared.first is not None:
            prepared.first(stop)
        for run in prepared.runs:
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


def _check(config: Config, question: Question) -> None:
    """Refuse a question whose parts do not go together."""
    if question.images is not None:
        _check_scoring(config, question)
    elif question.no_teacher and question.grids:
        raise UsageError("received --teacher with --no-teacher, expected one of them; leave the other out")
    elif question.held_out is not None and not question.adapters and question.no_teacher:
        raise UsageError("received --held-out with --no-teacher alone: nobody samples; give --adapter RUN")


def _prepare(config: Config, question: Question, out: Path) -> Prepared:
    if question.images is not None:
        return _prepare_scoring(config, question)
    if question.held_out is not None:
        return prepare_set(config, question)
    return prepare_inputs(config, question, out)


def _require_same_solves(out: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder whose runs started from other noise, or were measured otherwise.

    Raises:
        DataError: it is such a folder.
    """
    if not (out / LAYOUTS_FILE).exists():
        return
    _, before = load_layouts(out)
    if (were := _source(before)) != (are := _source(settings)):
        raise DataError(f"{out}: holds runs on {were}, received a question on {are}; give another --out")
    if "solve" in settings and "solve" not in before:
        raise DataError(
            f"{out}: its runs were not measured against the teacher's own solves (an earlier version's, or with"
            " evaluate.endpoint_error = false); give another --out, or go on without by"
            " --set evaluate.endpoint_error=false"
        )


def _source(settings: dict[str, Any]) -> str:
    """Say where layouts and noise come from."""
    if "held_out" not in settings:
        return "layouts and noise of its own"
    return f"the recorded set {settings['held_out']['set_hash'][:12]}"


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
    plan = make_plan(config, layouts, samples_per_layout=count_samples(images, layouts))
    return Prepared(plan=plan, settings={}, runs=[folder_run(images, images.resolve().name, plan.jobs())])
