from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError, UsageError
from stage2_student.evaluation import judges
from stage2_student.evaluation.crops import cut_line
from stage2_student.evaluation.judges import (
    Judge,
    PPOCRv4,
    Reading,
    find_ppocr_v4,
    load_judge,
)
from tests.stage2_student.evaluation.drawn_text import draw_layouts


def make_parrot() -> Judge:
    class Parrot:
        identity = "parrot 1"

        def read(self, crops):  # type: ignore[no-untyped-def]
            return [Reading(text="squawk", confidence=0.5) for _ in crops]

    return Parrot()


def test_a_reading_does_not_depend_on_what_else_is_read(judge: Judge) -> None:
    images, layouts = draw_layouts("neighbours", 12, 128, (14, 24))
    crops = [cut_line(image, layout.lines[0].polygon)[0] for image, layout in zip(images, layouts, strict=True)]
    wide = np.concatenate([crops[0]] * 6, axis=1)
    together = judge.read([wide, *crops])
    alone = [judge.read([crop])[0] for crop in [wide, *crops]]
    assert [reading.text for reading in together] == [reading.text for reading in alone]
    np.testing.assert_allclose(
        [reading.confidence for reading in together], [reading.confidence for reading in alone], atol=1e-4
    )


def test_nothing_to_read_is_an_empty_text_of_no_confidence(judge: Judge) -> None:
    assert judge.read([np.full((20, 60, 3), 128, np.uint8)]) == [Reading(text="", confidence=0.0)]
    assert judge.read([]) == []


def test_a_list_of_thread_counts_for_nested_regions_is_understood(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1,2")
    assert judges.load_judge("ppocr_v4").identity == judge.identity


def test_the_identity_names_the_weights(judge: Judge) -> None:
    assert judge.identity == "ppocr_v4 48fc40f24f6d"


def test_the_model_is_found_without_importing_its_package() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from stage2_student.evaluation.judges import find_ppocr_v4; find_ppocr_v4();"
        "sys.exit(any(name.startswith('rapidocr') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_a_recogniser_is_plugged_in_by_name() -> None:
    assert load_judge(f"{__name__}:make_parrot").identity == "parrot 1"


@pytest.mark.parametrize("name", ["tesseract", "no_such_module:make", f"{__name__}:no_such_factory"])
def test_an_unknown_recogniser_is_a_usage_error_that_names_it(name: str) -> None:
    with pytest.raises(UsageError, match=name.partition(":")[0]):
        load_judge(name)


def test_a_broken_model_file_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(find_ppocr_v4().read_bytes()[:1000])
    with pytest.raises(DataError, match="model.onnx"):
        PPOCRv4(tmp_path / "model.onnx")
    with pytest.raises(DataError, match="nothing.onnx"):
        PPOCRv4(tmp_path / "nothing.onnx")


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "PPOCR_V4_PACKAGE", "no_such_package_here")
    with pytest.raises(UsageError, match="pip install --no-deps rapidocr-onnxruntime==1.4.4"):
        find_ppocr_v4()
