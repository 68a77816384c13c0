from __future__ import annotations

import pytest

from stage2_student.evaluation.recognizers import Recognizer, load_recognizer


@pytest.fixture(scope="session")
def judge() -> Recognizer:
    return load_recognizer("ppocr_v4")
