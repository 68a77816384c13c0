"""RUN/watch/index.html: how the student grows, in one file that reloads itself for as long as training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.files import write_bytes_atomic
from common.layouts import Layout
from stage2_student.evaluation.table import RunRow
from stage2_student.report.data import Example, Training, embed_image
from stage2_student.report.markup import Child, Markup, tag
from stage2_student.report.parts import asked, document, sampled, section
from stage2_student.report.plots import loss_plot
from stage2_student.report.tables import bar, figure, table
from stage2_student.report.words import interval, percent, seconds
from stage2_student.watching.curves import accuracy_curve, color_curve, error_curve
from stage2_student.watching.gallery import Shown
from stage2_student.watching.log import Measured, best_of

PAGE_FILE = "index.html"
REFRESH_SECONDS = 30
"""The page reloads itself this often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageData:
    """All that is on the page."""

    run: Path
    """The run's folder."""
    max_steps: int | None
    """Of its training; None if it has not begun."""
    finished: bool
    """Whether training is done and everything measured: nothing will change any more."""
    records: int
    """Held-out records that each checkpoint is measured on."""
    judge: str
    """Who reads the images."""
    teacher: RunRow
    """What the teacher's own solves come to."""
    measured: Sequence[Measured]
    """By step."""
    held: Measured | None
    """What RUN/best holds."""
    gallery: Sequence[tuple[Layout, Sequence[Shown]]]
    """Images, the teacher's first, for each layout shown."""
    training: Training | None
    """Its curve; None without a log."""
    updated: str
    """When the page was written, UTC."""


def write_page(folder: Path, data: PageData) -> None:
    """Write the page, complete or not at all."""
    write_bytes_atomic(folder / PAGE_FILE, render(data).encode())


def render(data: PageData) -> str:
    """Return the page."""
    title = f"{data.run.resolve().name}: a student grows"
    header = tag("header", tag("h1", title), tag("p", _lead(data), class_="lead"), _tiles(data))
    footer = tag("footer", tag("p", f"Written by pipeline.py watch, {data.updated}.{_state(data)}"))
    main = tag("main", *(part for part in _sections(data) if part is not None))
    return document(title, header, main, footer, refresh=None if data.finished else REFRESH_SECONDS)


def _lead(data: PageData) -> str:
    until = f" of {data.max_steps}" if data.max_steps else ""
    reached = f", up to step {data.measured[-1].step}{until}" if data.measured else ""
    return (
        f"{len(data.measured)} checkpoints{reached}, each measured on {data.records} held-out records: sampled"
        " from the noise that the teacher had, compared with the teacher's own solve, and read by"
        f" {data.judge.split()[0]}, which took no part in sampling."
    )


def _state(data: PageData) -> str:
    return " Training is done." if data.finished else f" It reloads itself every {REFRESH_SECONDS} seconds."


def _tiles(data: PageData) -> Markup | None:
    if not data.measured:
        return None
    best, newest, teacher = best_of(data.measured), data.measured[-1], data.teacher.sen_acc
    assert best is not None
    tiles = [_tile(f"lowest endpoint error, at step {best.step}", best)]
    if newest is not best:
        tiles.append(_tile(f"endpoint error of the newest, step {newest.step}", newest))
    if newest.sen_acc is not None:
        tiles.append(
            tag(
                "li",
                tag("strong", percent(newest.sen_acc)),
                tag("span", f"Sen. Acc of the newest, step {newest.step}"),
                tag(
                    "small",
                    f"95 % interval {interval(newest.sen_acc)}; the teacher's own solves: {percent(teacher)}",
                ),
                class_="student",
            )
        )
    held = "nothing" if data.held is None else f"step {data.held.step}"
    tiles.append(tag("li", tag("strong", held), tag("span", "is in RUN/best, for sample, evaluate and export")))
    return tag("ul", *tiles, class_="tiles")


def _tile(what: str, one: Measured) -> Markup:
    return tag(
        "li",
        tag("strong", f"{one.endpoint_error.value:.4g}"),
        tag("span", what),
        tag("small", f"95 % interval {interval(one.endpoint_error, 1, 4)}"),
        class_="student",
    )


def _sections(data: PageData) -> list[Markup | None]:
    return [
        section(
            "Endpoint error",
            "Root mean square of the final latents against the teacher's own solve of the same noise, with 95 %"
            " intervals over the records: less is better, 0 is the teacher. It decides what RUN/best is.",
            error_curve(data.measured),
        ),
        section(
            "Text",
            "Lines read exactly as asked for (Sen. Acc) and normalised edit similarity (NED), more is better.",
            accuracy_curve(data.measured, data.teacher.sen_acc),
        ),
        section(
            "Colour",
            "How far the text's colour is from that of the same line in the teacher's image (CIELAB), over the"
            " lines whose text stands out of its ground in both: less is better, about 2 is just seen.",
            color_curve(data.measured),
        ),
        _gallery(data),
        section(
            "All checkpoints",
            "Distances are from the teacher's own solves. Time is that of networks and decoding.",
            _table(data) if data.measured else None,
        ),
        section("Training", "Loss of the run.", loss_plot([data.training] if data.training else [])),
    ]


def _table(data: PageData) -> Markup:
    head = [
        "",
        "endpoint error",
        "in boxes",
        "outside",
        "PSNR, dB",
        "Sen. Acc",
        "NED",
        "colour ΔE",
        "time per image",
    ]
    rows: list[tuple[str, Sequence[Child], str]] = [
        (
            f"step {one.step}" + (" (best)" if data.held is not None and one.step == data.held.step else ""),
            [
                figure(one.endpoint_error, 1, 4),
                figure(one.endpoint_error_inside, 1, 4),
                figure(one.endpoint_error_outside, 1, 4),
                figure(one.psnr, 1, 1),
                bar(one.sen_acc),
                figure(one.ned, 1, 3),
                figure(one.color, 1, 1),
                seconds(one.seconds_per_image),
            ],
            "student",
        )
        for one in reversed(data.measured)
    ]
    teacher = data.teacher
    rows.append(
        ("teacher's own solves", ["–"] * 4 + [bar(teacher.sen_acc), figure(teacher.ned, 1, 3), "–", "–"], "")
    )
    return table(head, rows)


def _gallery(data: PageData) -> Markup | None:
    articles = [
        tag(
            "article",
            tag("h3", *asked(layout.lines), tag("small", layout.caption)),
            tag(
                "div",
                *(
                    sampled(Example(run=one.label, image=embed_image(one.path), result=one.result))
                    for one in shown
                ),
                class_="figures",
            ),
        )
        for layout, shown in data.gallery
        if shown
    ]
    if not articles:
        return None
    intro = (
        "The first records, not chosen: the teacher's own solve, then the student by step, all of the same noise."
        " Under each image is what the judge read: wrong readings are red."
    )
    return tag("section", tag("h2", "The same noise, by step"), tag("p", intro, class_="intro"), *articles)
