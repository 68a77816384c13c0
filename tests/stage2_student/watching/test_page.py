"""The page of a watched run, in a real browser too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stage2_student.watching.gallery import choose
from stage2_student.watching.log import Measured, read_measured
from tests.browser import open_at, open_chromium
from tests.stage2_student.watching.conftest import RECORDS, STEPS


def test_chromium_shows_curves_and_images_whole_on_a_desktop_and_a_phone(watched: Path, tmp_path: Path) -> None:
    with open_chromium(tmp_path) as browser:
        for width in (1280, 390):
            open_at(browser, (watched / "watch/index.html").as_uri(), width)
            assert browser.get_log("browser") == []
            images = browser.execute_script(
                """return [...document.images].map(i =>
                     [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"""
            )
            assert len(images) == RECORDS * (1 + len(STEPS))
            assert all(complete and natural > 0 and shown >= 60 for complete, natural, shown in images)
            charts = browser.execute_script(
                """return [...document.querySelectorAll('svg.chart')].filter(s => s.getBoundingClientRect().width)
                     .map(s => [s.querySelector('title').textContent, s.querySelectorAll('.marker').length])"""
            )
            assert dict(charts)["Endpoint error against training steps"] == 3 * len(STEPS)
            assert dict(charts)["Text accuracy against training steps"] == 2 * len(STEPS)
            assert browser.execute_script("return document.documentElement.scrollWidth") == width


@pytest.mark.parametrize(("best", "expected"), [(0, 4), (17, 5)])
def test_of_many_checkpoints_the_first_the_newest_and_the_best_are_shown(
    watched: Path, best: int, expected: int
) -> None:
    line = read_measured(watched / "watch")[0]
    many: list[Measured] = [
        replace(line, step=step, endpoint_error=replace(line.endpoint_error, value=0.1 if step == best else 0.2))
        for step in range(40)
    ]
    steps = [one.step for one in choose(many, 5)]
    assert len(steps) == expected and steps == sorted(steps)
    assert {0, best, 39} <= set(steps)
    assert choose(many[:5], 5) == many[:5]
