"""The report itself: sections in the order in which they are read, in one file that needs no other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import write_bytes_atomic
from stage2_student.evaluation.table import Summary
from stage2_student.report.commands import commands
from stage2_student.report.data import Example, ReportData
from stage2_student.report.distance_plots import error_plot, way_plot
from stage2_student.report.highlights import full_solve, highlights, telling_pairs
from stage2_student.report.markup import Markup, join, tag
from stage2_student.report.parts import asked, document, sampled, section
from stage2_student.report.plots import accuracy_plot, loss_plot
from stage2_student.report.tables import differences_table, distances_table, heights_table, map_table, runs_table

_GROUND = (
    " Ground ΔE is how far the colours outside the lines are from the true image's (CIELAB, mean over generated"
    " images): less is better."
)


def write_report(path: Path, data: ReportData, title: str) -> None:
    """Write the page, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, render(data, title, path).encode())


def render(data: ReportData, title: str, path: Path) -> str:
    """Return the page.

    Args:
        data: what it shows.
        title: its heading.
        path: where it will lie, for the command that makes it again.
    """
    summary = data.summary
    return document(
        title,
        tag("header", tag("h1", title), tag("p", _lead(data), class_="lead"), highlights(summary)),
        tag("main", *_sections(data), _again_section(data, path, title)),
        tag(
            "footer",
            tag("p", "Made by pipeline.py report from the folders of this evaluation and of its training runs."),
        ),
    )


def _lead(data: ReportData) -> str:
    summary = data.summary
    samples = summary.settings["samples_per_layout"]
    per = f", {samples} images each" if samples > 1 else ""
    return (
        f"{summary.layouts} held-out layouts{per} with {summary.lines} lines of text in all, sampled by each"
        f" run from the same noise and read by {summary.settings['judge'].split()[0]}, which took no part"
        f" in sampling them.{_measured(data.invocations)}"
    )


def _measured(invocations: Sequence[Mapping[str, Any]]) -> str:
    """Say on which machines and from when to when; an evaluation may be made by several commands."""
    if not invocations:
        return ""
    machines = dict.fromkeys(str(line["machine"]) for line in invocations)
    days = sorted({str(line["time"])[:10] for line in invocations})
    return f" Measured {' to '.join(dict.fromkeys((days[0], days[-1])))} on {', and on '.join(machines)}."


def _sections(data: ReportData) -> list[Markup]:
    summary = data.summary
    runs = summary.runs
    distance = _distance_section(summary)
    found = [
        distance,
        section(
            "Accuracy against steps",
            "Lines read exactly as asked for (Sen. Acc), with 95 % intervals. The scale of steps is logarithmic.",
            accuracy_plot(summary),
        ),
        section(
            "All runs",
            f"NED is the normalised edit similarity.{_GROUND if any(run.ground for run in runs) else ''} A"
            " guided step of the teacher calls the UNet twice. Time is that of the networks, without the encoding"
            " of prompts. Intervals come from resampling the layouts: where all lines are right, or none is, they"
            " have no width, and say less than they seem to.",
            join(None if distance else _left_out(summary), runs_table(runs)),
        ),
        _examples_section(data),
        section(
            "Distance along the way",
            "After each step, how far a run's state is from the teacher's at the same timestep, from the noise"
            " (left) to the image (right); root of the mean square over images, with 95 % intervals.",
            way_plot(summary),
        ),
        section("By height of the text", "Sen. Acc, by the height of the line's box.", heights_table(runs)),
        section(
            "In and out of the glyph map",
            "Sen. Acc of the lines that the glyph map shows, and of those of which the glyph embedding alone says"
            " what they are.",
            map_table(runs),
        ),
        _differences_section(summary),
        section("Training", "Loss of the runs that made the students.", loss_plot(data.trainings)),
        _settings_section(data),
    ]
    return [part for part in found if part is not None]


def _distance_section(summary: Summary) -> Markup | None:
    """Show how far every run is from the teacher's own solve of the same noise."""
    solve = full_solve(summary.runs)
    name = f"the teacher's own solve in {solve.steps} steps" if solve else "the teacher's own full solve"
    text = (
        f"How far a run's images are from {name} of the same noise. Endpoint error is the root mean square"
        " difference of the latents, less is better; PSNR is that of the decoded images, more is better. It says"
        " how well a run does what the teacher does, and needs no judge; a run may be as good and elsewhere. Both"
        " scales of the plot are logarithmic; the solve itself is at 0, which has no place there."
    )
    table = distances_table(summary.runs)
    content = None if table is None else join(error_plot(summary), _left_out(summary), table)
    return section("Distance to the teacher's own solve", text, content)


def _left_out(summary: Summary) -> Markup | None:
    """Name the runs that a stop left incomplete."""
    labels = summary.incomplete
    if not labels:
        return None
    return tag("p", f"Not complete, left out: {'; '.join(labels)}. Run evaluate again to go on.", class_="missing")


def _differences_section(summary: Summary) -> Markup | None:
    """Show the pairs that answer a question, and all others folded."""
    differences = summary.differences
    if not differences:
        return None
    text = (
        "Two runs on the same layouts and noise, resampled together: far narrower than two intervals side by side."
        " What is called better or worse is beyond chance: its 95 % interval does not hold 0."
    )
    telling = telling_pairs(summary)
    rest = tag("details", tag("summary", f"All {len(differences)} pairs"), differences_table(differences))
    return section("Paired differences", text, join(differences_table(telling) if telling else None, rest))


def _examples_section(data: ReportData) -> Markup | None:
    if not data.examples:
        return None
    articles = [
        tag(
            "article",
            tag("h3", *asked(layout.lines), tag("small", layout.caption)),
            tag(
                "div",
                *(tag("div", *map(sampled, group), class_="figures") for group in _groups(data, examples)),
                class_="groups",
            ),
        )
        for layout, examples in data.examples
    ]
    intro = "The first layouts, not chosen. Under each image is what the judge read: wrong readings are red."
    return section("The same noise, sampled by each run", intro, join(*articles))


def _groups(data: ReportData, examples: Sequence[Example]) -> list[list[Example]]:
    """Put teacher and true images in one row, students in the next, what leaves a part out in a third."""
    runs = {run.label: run for run in data.summary.runs}
    rows: dict[int, list[Example]] = {}
    for example in examples:
        run = runs[example.run]
        row = 2 if run.is_ablation else 1 if run.kind == "student" else 0
        rows.setdefault(row, []).append(example)
    return [rows[row] for row in sorted(rows)]


def _settings_section(data: ReportData) -> Markup | None:
    blocks = [_settings("Evaluation", data.summary.settings)]
    blocks += [_settings(run.label, run.settings) for run in data.summary.runs if run.settings]
    blocks += [_settings(f"Training run {run.name}", run.config) for run in data.trainings if run.config]
    if data.invocations:
        blocks.append(_settings("Versions", data.invocations[-1]["packages"]))
    return section("Settings", "What the images and figures depend on.", join(*blocks))


def _settings(heading: str, values: Mapping[str, Any]) -> Markup:
    rows = [tag("div", tag("dt", name), tag("dd", value)) for name, value in _flatten(values)]
    return tag("details", tag("summary", heading), tag("dl", *rows))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Write nested settings as dotted names."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += _flatten(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _again_section(data: ReportData, path: Path, title: str) -> Markup | None:
    text = (
        "Run in the project's root. Every random choice is keyed, so that the same inputs give the same figures."
        " How many processes trained a student is not recorded: start as many, by accelerate or torchrun."
    )
    lines = [tag("code", f"{command}\n") for command in commands(data, path, title)]
    return section("How to make it again", text, tag("pre", *lines))
