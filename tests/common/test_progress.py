from __future__ import annotations

import logging

import pytest

from common import progress


def test_without_a_terminal_progress_is_a_log_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_SECONDS", 0.0)
    with (
        caplog.at_level(logging.INFO, "common.progress"),
        progress.Progress(4, "precompute", "sample", 1) as shown,
    ):
        shown.update(2, loss=0.5)
    assert caplog.messages[0].startswith("precompute: 3/4 sample, ")
    assert caplog.messages[0].endswith("/s, loss 0.5")
