"""What pages are made of: the document around them, a section, an image with what was read in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.layouts import Line
from stage2_student.report.data import Example
from stage2_student.report.markup import Child, Markup, tag

_STYLE = Path(__file__).with_name("style.css")


def document(title: str, *body: Child, refresh: int | None = None) -> str:
    """Return a whole page, which needs no other file.

    Args:
        title: for the browser's tab.
        body: header, main, footer.
        refresh: seconds after which the page loads itself anew; None for never.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="refresh", content=refresh) if refresh is not None else None,
        tag("title", title),
        tag("style", Markup(_STYLE.read_text())),
    )
    return f'<!doctype html>\n<html lang="en">{head}{tag("body", *body)}</html>\n'


def section(heading: str, intro: Child, content: Child) -> Markup | None:
    """Return a section; None without content."""
    if not content:
        return None
    return tag("section", tag("h2", heading), tag("p", intro, class_="intro"), content)


def asked(lines: Sequence[Line]) -> list[Child]:
    """Return the texts that an image should show."""
    if not lines:
        return [tag("em", "no text asked for")]
    return [tag("q", line.text) for line in lines]


def sampled(example: Example) -> Markup:
    """Return an image over what the judge read in it."""
    readings: list[Child] = []
    for line in example.result.lines:
        shown = line.read or "nothing"
        kind = "right" if line.exact else "wrong" if line.read else "wrong unread"
        readings.append(tag("span", shown, class_=f"reading {kind}"))
    return tag(
        "figure",
        tag("img", src=example.image, alt=f"sampled by {example.run}"),
        tag("figcaption", tag("small", example.run), *readings),
    )
