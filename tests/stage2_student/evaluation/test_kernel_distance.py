from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from common.errors import DataError
from common.layouts import Layout
from common.signals import StopFlag
from stage2_student.evaluation import detector as detector_module
from stage2_student.evaluation.detector import DETECTOR_FILE, MAPS, Detector, load_detector
from stage2_student.evaluation.image_features import FEATURES_FILE, append_features, load_features
from stage2_student.evaluation.judges import find_ocr_model
from stage2_student.evaluation.kernel_distance import ImageFeatures, halves_distance, kernel_distance
from stage2_student.evaluation.results import save_layouts
from stage2_student.evaluation.run_quality import TRUE_IMAGES
from stage2_student.evaluation.runs import Plan, Run, Sampled, evaluate_run, run_folder
from stage2_student.evaluation.summary import summarise
from stage2_student.evaluation.text_table import format_table
from tests.stage2_student.evaluation.drawn_text import draw_layouts
from tests.stage2_student.evaluation.test_judges import make_parrot

Picture = NDArray[np.uint8]
COUNT = 90


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(find_ocr_model(DETECTOR_FILE, "test"))


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Picture], list[Layout]]:
    return draw_layouts("distance", COUNT, 96, (14, 26))


def of(values: NDArray[np.float32]) -> ImageFeatures:
    """Features (n, F) or (n, S, F) of layouts by their number."""
    names = tuple(f"{index:04d}" for index in range(len(values)))
    return ImageFeatures(layout_ids=names, values=values.reshape(len(values), -1, values.shape[-1]))


def blur(image: Picture, sigma: float) -> Picture:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.uint8)


def noise(image: Picture, size: float) -> Picture:
    random_ = np.random.default_rng(int(image.sum()))
    return np.clip(image + random_.normal(0, size, image.shape), 0, 255).astype(np.uint8)


def redden(image: Picture, size: float) -> Picture:
    return np.clip(image + np.array([size, 0.0, -size]), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def truth(detector: Detector, drawn: tuple[list[Picture], list[Layout]]) -> ImageFeatures:
    return of(detector.features(drawn[0]))


@pytest.mark.parametrize(
    ("spoil", "strengths"), [(blur, (1.2, 2.0, 3.0)), (noise, (5, 10, 20)), (redden, (80, 120, 170))]
)
def test_stronger_blur_noise_and_shifts_of_colour_are_further_off_and_all_beyond_chance(
    detector: Detector,
    drawn: tuple[list[Picture], list[Layout]],
    truth: ImageFeatures,
    spoil: Callable[[Picture, float], Picture],
    strengths: tuple[float, ...],
) -> None:
    chance = halves_distance(truth, seed=0)
    assert chance is not None and chance.low < 0 < chance.high
    found = [
        kernel_distance(truth, of(detector.features([spoil(image, strength) for image in drawn[0]])), seed=0)
        for strength in strengths
    ]
    assert chance.high < found[0].low, found
    assert found[0].value < found[1].value < found[2].value, found


def test_it_is_the_mean_over_pairs_of_different_layouts_of_standardised_features() -> None:
    random_ = np.random.default_rng(0)
    x, y = random_.normal(3, 2, (2, 6, 5)).astype(np.float32)

    def k(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float((a @ b / 5 + 1) ** 3)

    mean, deviation = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    a, b = (x - mean) / deviation, (y - mean) / deviation
    pairs = [
        k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(a[j], b[i]) for i in range(6) for j in range(6) if i != j
    ]
    assert kernel_distance(of(x), of(y), seed=0).value == pytest.approx(np.mean(pairs), rel=1e-4)


def test_it_is_unbiased_and_its_interval_holds_the_true_distance() -> None:
    random_ = np.random.default_rng(1)
    same = [
        kernel_distance(of(x), of(y), seed=0) for x, y in random_.normal(size=(60, 2, 40, 3)).astype(np.float32)
    ]
    values = np.array([estimate.value for estimate in same])
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5  # of a biased one it would be far above
    assert np.mean([estimate.low <= 0 <= estimate.high for estimate in same]) > 0.85


def test_several_samples_of_a_layout_count_as_their_mean_and_are_not_compared_with_each_other() -> None:
    random_ = np.random.default_rng(2)
    x, y = random_.normal(size=(2, 20, 4)).astype(np.float32)
    once = kernel_distance(of(x), of(y + 1), seed=0)
    thrice = kernel_distance(of(np.repeat(x[:, None], 3, 1)), of(np.repeat(y[:, None] + 1, 3, 1)), seed=0)
    assert thrice.value == pytest.approx(once.value) and thrice.low == pytest.approx(once.low)
    assert thrice.count == 20


def test_what_never_changes_in_the_true_images_is_left_out() -> None:
    random_ = np.random.default_rng(3)
    x, y = random_.normal(size=(2, 20, 4)).astype(np.float32)
    constant = np.ones((20, 2), np.float32)
    more = kernel_distance(of(np.hstack([x, constant])), of(np.hstack([y, 9 * constant])), seed=0)
    assert more.value == pytest.approx(kernel_distance(of(x), of(y), seed=0).value)


def test_other_layouts_are_refused() -> None:
    values = np.zeros((5, 2), np.float32)
    with pytest.raises(ValueError, match="received 5 layouts"):
        kernel_distance(of(values[:4]), of(values), seed=0)
    assert halves_distance(of(values[:3]), seed=0) is None


def test_the_maps_are_those_that_onnx_finds_at_these_strides(detector: Detector) -> None:
    path = find_ocr_model(DETECTOR_FILE, "test")
    model = onnx.load(path)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in MAPS)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = draw_layouts("maps", 1, 96, (14, 26))[0][0]
    given = (image[None, :, :, ::-1] / 255 - detector_module.MEAN) / detector_module.DEVIATION
    maps = session.run(list(MAPS), {session.get_inputs()[0].name: given.transpose(0, 3, 1, 2).astype(np.float32)})
    assert [map_.shape for map_ in maps] == [(1, 32, 48, 48), (1, 48, 24, 24), (1, 96, 12, 12), (1, 192, 6, 6)]
    wanted = np.concatenate([value[0] for map_ in maps for value in (map_.mean((2, 3)), map_.std((2, 3)))])
    np.testing.assert_allclose(detector.features([image])[0], wanted, atol=1e-5)


def test_an_images_features_do_not_depend_on_what_else_is_looked_at(detector: Detector) -> None:
    images = draw_layouts("others", 18, 96, (14, 26))[0] + draw_layouts("wide", 1, 100, (14, 26))[0]
    together = detector.features(images)
    assert together.shape == (19, 736)
    for image, row in zip(images, together, strict=True):
        np.testing.assert_allclose(detector.features([image])[0], row, rtol=1e-3, atol=1e-4)


def test_a_file_without_the_maps_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"no network")
    for path in (tmp_path / "a.onnx", find_ocr_model("models/ch_PP-OCRv4_rec_infer.onnx", "test")):
        with pytest.raises(DataError, match="KID's detector .*expected the PP-OCRv4 detection ONNX file"):
            Detector(path)


def test_without_the_wheel_kid_is_left_out_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(detector_module, "DETECTOR_FILE", "models/none.onnx")
    assert load_detector() is None
    assert "KID is left out: KID's detector: its model was not found" in caplog.text


def test_features_come_back_as_they_were_noted_and_only_if_all_are_there(
    detector: Detector, drawn: tuple[list[Picture], list[Layout]], tmp_path: Path
) -> None:
    images, layouts = drawn[0][:3], drawn[1][:3]
    jobs = [(layout, sample) for layout in layouts for sample in (0, 1)]
    expected = sorted((layout.layout_id, sample) for layout, sample in jobs)
    append_features(tmp_path, jobs[:4], detector, [images[0]] * 4)
    assert load_features(tmp_path / FEATURES_FILE, expected) is None
    with (tmp_path / FEATURES_FILE).open("ab") as file:
        file.write(b'{"layout_id":"torn')
    append_features(tmp_path, jobs, detector, [image for image in images for _ in (0, 1)])
    loaded = load_features(tmp_path / FEATURES_FILE, expected)
    assert loaded is not None and loaded[0] == detector.identity
    assert loaded[1].layout_ids == tuple(layout.layout_id for layout in layouts)
    wanted = np.repeat(detector.features(images)[:, None], 2, 1)
    np.testing.assert_allclose(loaded[1].values, wanted, rtol=1e-3, atol=1e-4)

    lines = (tmp_path / FEATURES_FILE).read_text().splitlines()
    other = json.dumps({**json.loads(lines[-1]), "detector": "another"})
    (tmp_path / FEATURES_FILE).write_text("\n".join([*lines, other]) + "\n")
    assert load_features(tmp_path / FEATURES_FILE, expected) is None
    (tmp_path / FEATURES_FILE).write_text("\n".join([*lines, '{"layout_id": "a"}']) + "\n")
    with pytest.raises(DataError, match=r"features.jsonl, line 11: damaged .*remove the file"):
        load_features(tmp_path / FEATURES_FILE, expected)


def test_the_table_has_kid_to_the_true_images_and_between_halves_of_them(
    detector: Detector, drawn: tuple[list[Picture], list[Layout]], tmp_path: Path
) -> None:
    images, layouts = drawn[0][:24], drawn[1][:24]
    by_id = {layout.layout_id: image for image, layout in zip(images, layouts, strict=True)}
    plan = Plan(layouts=layouts, detector=detector)
    save_layouts(tmp_path, layouts, {"samples_per_layout": 1, "judge": "parrot 1"})

    def sampled(label: str, kind: str, sigma: float = 0.0, plan: Plan = plan) -> None:
        def sample(jobs: object) -> Sampled:
            drawn_ = [by_id[layout.layout_id] for layout, _ in jobs]  # type: ignore[attr-defined]
            return Sampled(images=[blur(image, sigma) if sigma else image for image in drawn_])

        evaluate_run(Run(label=label, kind=kind, sample=sample), plan, make_parrot(), tmp_path, StopFlag())

    sampled("blurred", "teacher", 2.0)
    sampled("as before", "student", plan=Plan(layouts=layouts))  # a run from before KID
    assert all(run.kid is None for run in summarise(tmp_path).runs)  # there is nothing to compare with
    sampled(TRUE_IMAGES, "truth")
    sampled("sharp", "teacher")
    summary = summarise(tmp_path)
    kids = {run.label: run.kid for run in summary.runs}
    assert kids["as before"] is None
    sharp, blurred, halves = kids["sharp"], kids["blurred"], kids[TRUE_IMAGES]
    assert sharp is not None and blurred is not None and halves is not None
    assert sharp.value == pytest.approx(0, abs=1e-6)
    assert blurred.low > halves.high > 0 and blurred.count == 24
    saved = {run["label"]: run for run in json.loads((tmp_path / "evaluation.json").read_bytes())["runs"]}
    assert saved["blurred"]["kid"]["value"] == blurred.value and "kid" not in saved["as before"]
    table = format_table(summary)
    assert f"{blurred.value:.3f} [{blurred.low:.3f}, {blurred.high:.3f}]" in table
    assert "KID of the true images: between two random halves of them" in table
    assert (run_folder(tmp_path, "blurred") / FEATURES_FILE).is_file()
