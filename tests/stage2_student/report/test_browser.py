"""The report in a real browser."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome

from stage2_student.report.data import gather
from stage2_student.report.page import write_report
from tests.browser import open_at, open_chromium
from tests.stage2_student.report import crowded as crowded_page

WIDTHS = {"desktop": 1280, "smallest table": 961, "tablet": 768, "phone": 390}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with open_chromium(tmp_path_factory.mktemp("chromium")) as chrome:
        yield chrome


@pytest.fixture(scope="module")
def addresses(
    evaluation: Path,
    training: Path,
    crowded: Path,
    trainings: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder / "usual.html", gather(evaluation, [training]), "How well text is sampled")
    write_report(folder / "crowded.html", gather(crowded, trainings, 2), crowded_page.HOSTILE)
    return {path.stem: path.as_uri() for path in folder.iterdir()}


@pytest.fixture(params=["usual", "crowded"])
def address(request: pytest.FixtureRequest, addresses: dict[str, str]) -> str:
    return addresses[request.param]


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_the_page_is_shown_whole(browser: Chrome, address: str, width: int) -> None:
    open_at(browser, address, width)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.innerWidth") == width

    # All images are there and have a size on the screen.
    images = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
    )
    assert len(images) == (2 * len(crowded_page.RUNS) if "crowded" in address else 35)
    assert all(complete and natural > 0 and shown >= 60 for complete, natural, shown in images)

    # What others named is text.
    assert browser.execute_script("return document.querySelectorAll('script, h3 b, th b').length") == 0

    # Nothing reaches beyond the right edge, folded parts unfolded.
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    cut = browser.execute_script(
        """return [...document.querySelectorAll('body *')].filter(e => {
             const box = e.getBoundingClientRect();
             const hidden = e.closest('thead') && getComputedStyle(e.closest('thead')).position === 'absolute';
             return box.width && !hidden && (box.right > window.innerWidth + 1 || box.left < -1);
           }).map(e => e.outerHTML.slice(0, 120))"""
    )
    assert cut == []
    clipped = browser.execute_script(
        """const kinds = 'td, th, td > *, td small, figcaption, li, h1, h2, h3, dd, dt, p, summary, pre';
           return [...document.querySelectorAll(kinds)].filter(e => e.offsetParent && !e.closest('thead')
             && getComputedStyle(e).display !== 'inline' && e.scrollWidth > e.clientWidth + 1
           ).map(e => e.outerHTML.slice(0, 120))"""
    )
    assert clipped == []


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_text_in_charts_is_neither_clipped_nor_written_over(browser: Chrome, address: str, width: int) -> None:
    open_at(browser, address, width)
    charts = browser.execute_script(
        """return [...document.querySelectorAll('svg.chart')].filter(s => s.getBoundingClientRect().width).map(s =>
             [s, ...s.querySelectorAll('text')].map(e => {
               const box = e.getBoundingClientRect();
               return [box.left, box.top, box.right, box.bottom];
             }))"""
    )
    assert len(charts) == 4
    for (left, top, right, bottom), *texts in charts:
        for text in texts:
            assert left <= text[0] and top <= text[1] and text[2] <= right and text[3] <= bottom
        for a, b in itertools.combinations(texts, 2):
            across = min(a[2], b[2]) - max(a[0], b[0])
            down = min(a[3], b[3]) - max(a[1], b[1])
            assert across <= 0 or down <= 5  # boxes are higher than digits


def test_every_measured_point_can_be_seen(browser: Chrome, addresses: dict[str, str]) -> None:
    """Runs of equal steps, or UNet calls, stand side by side, so that no marker lies on another.

    Along the way states of many runs are at the same timesteps; there lines and colours tell them apart.
    """
    for width in WIDTHS.values():
        open_at(browser, addresses["crowded"], width)
        centres = browser.execute_script(
            """return [...document.querySelectorAll('section')]
                 .filter(s => !s.innerText.startsWith('Distance along the way'))
                 .flatMap(s => [...s.querySelectorAll('svg.chart .marker')]).map(e => e.getBoundingClientRect())
                 .filter(b => b.width).map(b => [b.left + b.width / 2, b.top + b.height / 2])"""
        )
        assert len(centres) == 10 + 9  # accuracies, errors but for the solve's own
        assert min(math.dist(a, b) for a, b in itertools.combinations(centres, 2)) >= 5


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_its_text_can_be_read(browser: Chrome, address: str, width: int) -> None:
    """No text is smaller than 11 px on the screen, charts included, and one chart of each pair is shown."""
    open_at(browser, address, width)
    sizes = browser.execute_script(
        """return [...document.querySelectorAll('svg.chart')].filter(s => s.getBoundingClientRect().width).map(s =>
             parseFloat(getComputedStyle(s.querySelector('text')).fontSize)
               * s.getBoundingClientRect().width / s.viewBox.baseVal.width)"""
    )
    assert len(sizes) == 4
    assert min(sizes) >= 10.5
    smallest = browser.execute_script(
        """return Math.min(...[...document.querySelectorAll('body *')].filter(e => e.offsetParent && e.innerText)
             .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
    )
    assert smallest >= 11


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_a_screenshot_is_not_blank(browser: Chrome, addresses: dict[str, str], width: int) -> None:
    open_at(browser, addresses["usual"], width)
    shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    assert shot.width == width
    pixels = np.asarray(shot, int)
    ground = pixels[2, 2]
    sampled = (np.abs(pixels - ground).sum(axis=2) > 60).mean()
    assert sampled > 0.02
    # The first screen says the title and the tiles: there is ink in its upper and in its lower half.
    halves = np.abs(pixels - ground).sum(axis=2) > 60
    assert halves[:450].mean() > 0.01 and halves[450:].mean() > 0.005
