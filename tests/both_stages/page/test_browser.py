"""The page in a real browser that reaches this machine alone."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tests.browser import LOOPBACK_ALONE, open_at, open_chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with open_chromium(tmp_path_factory.mktemp("chromium"), LOOPBACK_ALONE) as chrome:
        yield chrome


def find(browser: Chrome, css: str) -> list:  # type: ignore[type-arg]
    return browser.find_elements(By.CSS_SELECTOR, css)


def open_page(browser: Chrome, port: int, width: int) -> None:
    open_at(browser, f"http://127.0.0.1:{port}/", width)
    WebDriverWait(browser, 20).until(lambda _: find(browser, "#examples button"))


def drag(browser: Chrome, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag on the picture, in parts of its side from its middle."""
    (stage,) = find(browser, "#stage")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
    side = stage.size["width"]
    (x0, y0), (x1, y1) = [(int(x * side), int(y * side)) for x, y in (start, end)]
    ActionChains(browser, duration=20).move_to_element_with_offset(stage, x0, y0).click_and_hold().move_by_offset(
        x1 - x0, y1 - y0
    ).release().perform()


def press(browser: Chrome, css: str) -> None:
    button = find(browser, css)[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()


def images(browser: Chrome) -> list[np.ndarray]:  # type: ignore[type-arg]
    addresses = [image.get_attribute("src") for image in find(browser, "#results img")]
    files = [base64.b64decode(address.removeprefix("data:image/png;base64,")) for address in addresses]
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files]


def requests(browser: Chrome) -> tuple[set[str], list[str]]:
    """Return what was asked of which address, and what failed."""
    asked, failed = set(), []
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        parameters = event["params"]
        if event["method"] == "Network.requestWillBeSent":
            asked.add(parameters["request"]["url"])
        elif event["method"] == "Network.loadingFailed":
            failed.append(parameters["errorText"])
        elif event["method"] == "Network.responseReceived" and parameters["response"]["status"] >= 400:
            failed.append(parameters["response"]["url"])
    return asked, failed


def wait_for_images(browser: Chrome, count: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    def done(_: Chrome) -> bool:
        return find(browser, "#status")[0].text.startswith("Done") and len(find(browser, "#results img")) == count

    WebDriverWait(browser, 60).until(done)
    return images(browser)


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_a_box_is_drawn_and_sampled_with_no_request_to_elsewhere(browser: Chrome, port: int, width: int) -> None:
    open_page(browser, port, width)
    drag(browser, (-0.4, -0.3), (0.3, 0.1))
    assert len(find(browser, ".box")) == 1
    find(browser, "#lines input[type=text]")[0].send_keys("OPEN")
    box = find(browser, "#lines input.place")[0].get_attribute("value")
    assert np.allclose([float(part) for part in box.split(",")], [6.4, 12.8, 51.2, 38.4], atol=2)  # of 64 pixels
    find(browser, "#caption")[0].send_keys("a sign")
    find(browser, "#beside option:last-child")[0].click()  # the teacher
    press(browser, "#sample")
    student, teacher = wait_for_images(browser, 2)
    assert student.shape == teacher.shape == (64, 64, 3)
    assert student.std() > 5 and teacher.std() > 5  # not blank
    said = find(browser, "#results")[0].text
    assert "2 steps, 2 UNet calls an image," in said and "s for 1 image, seed 0" in said
    shown = [image.rect for image in find(browser, "#results img")]
    assert all(rect["width"] >= 150 and rect["x"] + rect["width"] <= width for rect in shown)
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    assert browser.get_log("browser") == []
    asked, failed = requests(browser)
    here = f"http://127.0.0.1:{port}/"
    # Chromium asks itself for what its own pages are made of.
    assert {address for address in asked if not address.startswith((here, "data:", "chrome://"))} == set()
    assert here + "sample" in asked and failed == []


def test_a_box_is_moved_resized_and_removed(browser: Chrome, port: int) -> None:
    open_page(browser, port, 1280)

    def box() -> list[float]:
        return [float(part) for part in find(browser, "#lines input.place")[0].get_attribute("value").split(",")]

    drag(browser, (-0.4, -0.4), (-0.1, -0.2))
    drawn = box()
    drag(browser, (-0.3, -0.3), (0.0, 0.0))
    moved = box()
    assert np.allclose(np.subtract(moved, drawn), 0.3 * 64, atol=2)
    drag(browser, (0.19, 0.09), (0.4, 0.4))  # by its corner
    assert np.allclose(box(), [*moved[:2], 0.9 * 64, 0.9 * 64], atol=3)
    drag(browser, (0.45, 0.45), (0.45, 0.45))  # a click draws nothing
    assert len(find(browser, ".box")) == 1
    press(browser, "#lines button")
    assert find(browser, ".box") == []


def test_what_is_wrong_is_said_and_mended(browser: Chrome, port: int) -> None:
    open_page(browser, port, 390)
    press(browser, "#sample")
    WebDriverWait(browser, 20).until(lambda _: find(browser, "#error")[0].is_displayed())
    assert "write a caption" in find(browser, "#error")[0].text
    press(browser, "#examples button")
    press(browser, "#sample")
    wait_for_images(browser, 1)
    assert not find(browser, "#error")[0].is_displayed()


def test_an_uploaded_image_is_shown_and_edited(browser: Chrome, port: int, tmp_path: Path) -> None:
    Image.fromarray(np.full((80, 80, 3), 60, np.uint8)).save(tmp_path / "photo.png")
    open_page(browser, port, 1280)
    press(browser, "#examples button")
    press(browser, "#sample")
    (generated,) = wait_for_images(browser, 1)
    press(browser, "[value=edit]")
    find(browser, "#file")[0].send_keys(str(tmp_path / "photo.png"))
    WebDriverWait(browser, 20).until(lambda _: find(browser, "#source")[0].is_displayed())
    press(browser, "#sample")
    WebDriverWait(browser, 60).until(lambda _: not np.array_equal(images(browser)[0], generated))
