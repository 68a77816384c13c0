from __future__ import annotations

import pytest

from stage2_student.evaluation.judges import Judge, load_judge


@pytest.fixture(scope="session")
def judge() -> Judge:
    return load_judge("ppocr_v4")
