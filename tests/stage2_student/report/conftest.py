from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.signals import StopFlag
from stage2_student.evaluation.endpoint import Distance, SquareErrors, StateError
from stage2_student.evaluation.invocation import note_invocation
from stage2_student.evaluation.judges import Judge, load_judge
from stage2_student.evaluation.results import save_layouts
from stage2_student.evaluation.runs import Job, Plan, Run, Sampled, evaluate_run
from tests.stage2_student.evaluation.drawn_text import draw_layouts
from tests.stage2_student.report.crowded import make_evaluation, make_trainings

HOSTILE = '<script>alert("&")</script>'
"""A caption that must be shown, not run."""

RUNS = (
    ("true images", "truth", 0, 0.0, {}),
    ("teacher, 40 steps (as recorded)", "teacher", 40, 0.4, {"grid": "trailing:40", "rounds_states": True}),
    ("teacher, 20 steps (upstream grid)", "teacher", 20, 0.6, {"grid": "upstream:20"}),
    ("teacher, 4 steps (trailing grid)", "teacher", 4, 3.0, {"grid": "trailing:4"}),
    ("run-a, 4 steps", "student", 4, 0.8, {"objective": "phased"}),
    ("run-b, 1 step", "student", 1, 2.0, {"objective": "phased"}),
    (
        "teacher, 20 steps (upstream grid) without attnx",
        "teacher",
        20,
        2.0,
        {"grid": "upstream:20", "without": "attnx"},
    ),
)
"""Label, kind, steps, blur of what it samples (pixels), settings."""


def distance(share: float, steps: int) -> Distance:
    """Return a distance that falls with the steps, 0 at 40 of them, with its way in 4 steps."""
    far = 0.0 if steps == 40 else share / steps**2
    way = tuple(StateError(timestep=at, square=far * share) for at in (749, 499, 249, -1)) if steps == 4 else ()
    errors = SquareErrors(whole=far, inside=2 * far, outside=far / 2)
    return Distance(latents=errors, psnr=30.0 + steps if far else None, way=way)


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated folder: true images, the more blurred the worse the run."""
    folder = tmp_path_factory.mktemp("evaluation")
    judge: Judge = load_judge("ppocr_v4")
    images, layouts = draw_layouts("report", 5, 96, (14, 30))
    layouts[0] = type(layouts[0])(
        layout_id=layouts[0].layout_id, size=layouts[0].size, lines=layouts[0].lines, caption=HOSTILE
    )
    by_id = {layout.layout_id: image for layout, image in zip(layouts, images, strict=True)}
    save_layouts(folder, layouts, {"samples_per_layout": 1, "judge": judge.identity, "seed": 0})
    note_invocation(folder, ["pipeline.py", "evaluate", "--out", "some where"], {})
    for label, kind, steps, blur, settings in RUNS:

        def sample(jobs: Sequence[Job], steps: int = steps, blur: float = blur) -> Sampled:
            pictures = [by_id[layout.layout_id] for layout, _ in jobs]
            blurred = [np.asarray(cv2.GaussianBlur(p, (0, 0), blur), np.uint8) if blur else p for p in pictures]
            calls = steps * len(jobs)
            far = [distance(1 + number / 9, steps) for number in range(len(jobs))] if steps else []
            return Sampled(images=blurred, seconds=0.01 * calls, unet_evaluations=calls, distances=far)

        run = Run(label=label, kind=kind, steps=steps, sample=sample, settings=settings)
        evaluate_run(run, Plan(layouts=layouts), judge, folder, StopFlag())
    return folder


@pytest.fixture(scope="session")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large evaluation's folder, of long and hostile names."""
    return make_evaluation(tmp_path_factory.mktemp("crowded"))


@pytest.fixture(scope="session")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven training runs, of long names."""
    return make_trainings(tmp_path_factory.mktemp("trainings"))


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run-a"
    run.mkdir()
    lines = [{"step": step, "loss": 1 / (1 + step / 50), "learning_rate": 1e-3} for step in range(10, 2001, 10)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.json").write_text(json.dumps({"train": {"num_phases": 4}, "lora": {"targets": ["to_q"]}}))
    return run
