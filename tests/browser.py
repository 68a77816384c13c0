"""A real Chromium for tests. Needs Debian's packages chromium and chromium-driver; CI installs them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

FLAGS = (
    "--headless",
    "--no-sandbox",  # for root, as in containers
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
LOOPBACK_ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
"""Denies every other host."""


@contextmanager
def open_chromium(profile: Path, *flags: str) -> Iterator[Chrome]:
    """Start a browser, or skip the test that needs it.

    Args:
        profile: an empty folder.
        *flags: besides FLAGS.
    """
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        if os.environ.get("REQUIRE_CHROMIUM"):
            pytest.fail("REQUIRE_CHROMIUM is set and chromium or chromedriver is not installed")
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium chromium-driver)")
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}", *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with Chrome(options=options, service=ChromeService(driver)) as chrome:
        yield chrome


def open_at(browser: Chrome, address: str, width: int) -> None:
    """Open a page in a window of so many pixels' width, 900 high, and wait until it is drawn; narrow is a phone's.

    On a busy machine Chromium loads a page before it has laid all of it out for the new width.
    """
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(address)
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
