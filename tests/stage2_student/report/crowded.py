"""A large evaluation and its training runs, written down without sampling or reading: what strains the page."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from common.layouts import Layout, Line
from shards.files.frozen import FrozenSet, write_frozen
from stage2_student.evaluation.endpoint import Distance, SquareErrors, StateError
from stage2_student.evaluation.invocation import note_invocation
from stage2_student.evaluation.reading import LineResult
from stage2_student.evaluation.results import RESULTS_FILE, RUN_FILE, ImageResult, open_results, save_layouts
from stage2_student.evaluation.results import check_or_create as describe
from stage2_student.evaluation.runs import run_folder
from stage2_student.evaluation.summary import QUALITY_FILE

HOSTILE = """<script>alert("x")</script> 'q' "q" & <b>"""
"""A label, and a text, that must be shown and not run."""
LONG_NAME = "student_of_rank_32_on_fifty_thousand_inputs_cosine_schedule_2"
LONG_TEXT = "WWWWWWWWWWWWWWWWWWWW"
PARTS = ("attnx", "caption", "color", "glyph-embedding", "glyph-embedding+glyph-map")
RED, BLUE = (255.0, 0.0, 0.0), (0.0, 0.0, 255.0)
TEACHER: dict[str, Any] = {"teacher": "0123456789abcdef" * 4, "dtype": "float32", "guidance_scale": 3.0}
UPSTREAM = {**TEACHER, "grid": "upstream:20", "without": ""}


def student(name: str, steps: int, right: float, objective: str = "phased") -> tuple[str, str, int, float, Any]:
    """Return the entry in RUNS of a student."""
    settings = {"objective": objective, "adapter": {"unet/adapter_model.safetensors": "0123456789abcdef" * 4}}
    return f"{name}, {steps} step{'s' * (steps > 1)}", "student", steps, right, settings


RUNS = (
    ("true images", "truth", 0, 1.0, {}),
    ("true images through the VAE", "vae", 0, 0.98, {}),
    (
        "teacher, 40 steps (as recorded)",
        "teacher",
        40,
        0.9,
        {**TEACHER, "grid": "trailing:40", "rounds_states": True},
    ),
    ("teacher, 20 steps (upstream grid)", "teacher", 20, 0.88, UPSTREAM),
    ("teacher, 8 steps (trailing grid)", "teacher", 8, 0.5, {**TEACHER, "grid": "trailing:8"}),
    ("teacher, 4 steps (trailing grid)", "teacher", 4, 0.3, {**TEACHER, "grid": "trailing:4"}),
    student(LONG_NAME, 8, 0.95),
    student("phased-4", 4, 0.8),
    student("phased-4-rank-64", 4, 0.8),
    student("phased-2", 2, 0.6),
    student("lcm-4", 4, 0.5, "lcm"),
    student(HOSTILE, 1, 0.4, HOSTILE),
    *(
        (
            f"teacher, 20 steps (upstream grid) without {part.replace('-', ' ').replace('+', ' and ')}",
            "teacher",
            20,
            0.35,
            {**UPSTREAM, "without": part},
        )
        for part in PARTS
    ),
)
"""Label, kind, steps, share of lines read right, settings."""


def make_evaluation(folder: Path) -> Path:
    """Write an evaluation of 20 layouts by 17 runs, and an eighteenth that was stopped."""
    random_ = random.Random("crowded")
    layouts = []
    for number in range(20):
        texts = [random_.choice(["OPEN", "Wk7", HOSTILE[:20], LONG_TEXT]) for _ in range(1 + number % 2)]
        lines = [_line(text, random_.choice([10, 18, 28, 40, 80]), random_.choice([RED, BLUE])) for text in texts]
        lines[0] = replace(lines[0], in_glyph_map=number % 7 > 0)
        caption = HOSTILE if number == 0 else "a plain ground"
        layouts.append(
            Layout(layout_id=f"l{number:02d}", size=(96, 96), lines=tuple(lines), caption=caption, name="")
        )
    settings = {"samples_per_layout": 1, "judge": "ppocr_v4 0123456789abcdef", "seed": 0}
    save_layouts(folder, layouts, settings)
    note_invocation(folder, ["pipeline.py", "evaluate", "--out", "evaluation"], {})
    for label, kind, steps, right, settings in RUNS:
        _write_run(folder, layouts, label, kind, steps, right, settings)
    _write_run(folder, layouts[:5], "stopped, 4 steps", "student", 4, 0.5, {"objective": "phased"})
    return folder


def _line(text: str, height: float, color: tuple[float, float, float]) -> Line:
    return Line(text=text, polygon=((0.0, 0.0), (90.0, 0.0), (90.0, height), (0.0, height)), color=color)


def _write_run(
    folder: Path, layouts: Sequence[Layout], label: str, kind: str, steps: int, right: float, settings: Any
) -> None:
    place = run_folder(folder, label)
    describe(place / RUN_FILE, {"label": label, "kind": kind, "steps": steps, "settings": settings}, label)
    (place / "images").mkdir()
    Image.linear_gradient("L").resize((96, 96)).save(place / "images" / "0.png")
    random_ = random.Random(label)
    results = []
    for number, layout in enumerate(layouts):
        lines = tuple(
            LineResult(
                text=line.text,
                read=line.text if random_.random() < right else random_.choice(["", "0PEN", "<i>"]),
                confidence=0.9,
                height=line.polygon[2][1],
                color=line.color,
                found_color=line.color if random_.random() < right else (0.0, 255.0, 0.0),
                in_glyph_map=line.in_glyph_map,
            )
            for line in layout.lines
        )
        results.append(
            ImageResult(
                layout_id=layout.layout_id,
                sample=0,
                lines=lines,
                seconds=0.01 * steps,
                unet_evaluations=steps * (2 if kind == "teacher" else 1),
                writenet_evaluations=float(steps > 0),
                image="0.png" if number < 6 else "",
                ground=None if number % 4 == 3 else 12 * (1 - right) * random_.uniform(0.5, 1.5),
                distance=_distance(random_, steps, right) if steps else None,
            )
        )
    with open_results(place / RESULTS_FILE) as writer:
        writer.append(*results)
    quality = {"clip_score": 31.24} | ({} if kind == "truth" else {"fid": 123.45})
    (place / QUALITY_FILE).write_text(json.dumps(quality))


def _distance(random_: random.Random, steps: int, right: float) -> Distance:
    far = 0.0 if steps == 40 else 4 * (1.01 - right) * random_.uniform(0.5, 1.5)
    way = tuple(StateError(timestep=at, square=far) for at in (899, 499, 24, -1)) if far else ()
    errors = SquareErrors(whole=far, inside=1234 * far, outside=far / 1234)
    return Distance(latents=errors, psnr=random_.uniform(10, 50) if far else None, way=way)


def make_trainings(folder: Path) -> list[Path]:
    """Write seven training runs, of long names, small losses and many steps."""
    runs = []
    for number in range(7):
        run = folder / f"{LONG_NAME}_{number}"
        run.mkdir()
        lines = [
            {"step": k, "loss": 0.0003 * (1 + number / 5 + 9 / (1 + k / 999))} for k in range(250, 20001, 250)
        ]
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = {"train": {"objective": "phased", "learning_rate": 1e-5}, "lora": {"targets": ["to_q", "ff.*"]}}
        (run / "config.json").write_text(json.dumps(config))
        frozen = FrozenSet(location=str(folder / "my shards"), identity_sha256="0", shards=(), excluded={})
        write_frozen(run, frozen)
        runs.append(run)
    return runs
