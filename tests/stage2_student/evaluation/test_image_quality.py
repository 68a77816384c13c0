"""FID and CLIP score with networks of the right interface and random weights: the arithmetic and the paths."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from both_stages import evaluating
from common.errors import DataError, Stopped
from common.signals import StopFlag
from pipeline import cli
from stage2_student.evaluation import image_quality
from stage2_student.evaluation.image_quality import (
    clip_score,
    fid,
    find_reference,
    kept_images,
    measure_quality,
)
from stage2_student.evaluation.runs import Plan, Run, Sampled, evaluate_run, run_folder
from stage2_student.evaluation.summary import QUALITY_FILE
from tests.stage1_teacher.small_teacher import annotation, write_annotations, write_teacher
from tests.stage2_student.evaluation.drawn_text import draw_layouts
from tests.stage2_student.evaluation.test_judges import make_parrot

ROOT = Path(__file__).parents[3]


class MeanColor(nn.Module):
    """In Inception's place: three features, the mean of each channel."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return images.float().mean(dim=[2, 3])


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pt"
    torch.jit.script(MeanColor()).save(str(path))
    return path


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(3)  # with it the scores below are above 0, where they are cut off
    config = CLIPConfig(
        text_config=sizes, vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models" / "tiny" / "clip")
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def write_images(folder: Path, colors: NDArray[np.float64]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:02d}.png" for i in range(len(colors))]
    for path, color in zip(paths, colors, strict=True):
        Image.fromarray(np.tile(color.astype(np.uint8), (8, 8, 1))).save(path)
    return paths


def test_fid_is_the_frechet_distance_of_the_features(inception: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colors = rng.integers(50, 200, (40, 3)).astype(float)
    real, moved = write_images(tmp_path / "a", colors), write_images(tmp_path / "b", colors + np.array([30, 0, 0]))
    assert fid(inception, real, real, StopFlag()) == pytest.approx(0, abs=1e-2)
    # equal covariances, means 30 apart
    assert fid(inception, real, moved, StopFlag()) == pytest.approx(30**2, rel=1e-3)
    with pytest.raises(DataError, match="received 1 sampled and 40 real images, expected at least two"):
        fid(inception, real, moved[:1], StopFlag())


def test_the_clip_score_is_that_of_image_and_caption(clip_folder: Path, tmp_path: Path) -> None:
    paths = write_images(tmp_path / "a", np.array([[255.0, 0, 0], [0, 0, 255.0], [9, 9, 9]]))
    captions = ["a red sign", "a blue sign", "many words " * 100]
    stop = StopFlag()
    each = [clip_score(clip_folder, [path], [text], stop) for path, text in zip(paths, captions, strict=True)]
    assert clip_score(clip_folder, paths, captions, stop) == pytest.approx(np.mean(each), abs=1e-3)
    assert all(0 < score < 100 for score in each)
    assert clip_score(clip_folder, paths[:1], ["something else"], stop) != pytest.approx(each[0], abs=1e-4)


def test_both_show_their_progress_and_end_on_a_signal(
    inception: Path, clip_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_images(tmp_path / "a", np.arange(60.0).reshape(20, 3))
    stop = StopFlag()
    with caplog.at_level(logging.INFO, "common.progress"):
        fid(inception, images[:18], images, stop)
        clip_score(clip_folder, images, ["a sign"] * 20, stop)
    assert "FID: 38/38 image" in caplog.text
    assert "CLIP score: 20/20 image" in caplog.text
    stop.stop_requested = True
    with pytest.raises(Stopped, match="FID is not yet computed: run the same command again"):
        fid(inception, images, images, stop)
    with pytest.raises(Stopped, match="CLIP score is not yet computed: run the same command again"):
        clip_score(clip_folder, images, ["a sign"] * 20, stop)


def test_weights_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"no TorchScript")
    images = write_images(tmp_path / "a", np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"evaluate.fid_weights .*weights.pt.*inception-2015-12-05.pt"):
        fid(tmp_path / "weights.pt", images, images, StopFlag())
    with pytest.raises(DataError, match="evaluate.clip_score_model"):
        clip_score(tmp_path / "a", images, ["a", "b"], StopFlag())


def test_an_image_that_is_none_is_named(inception: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "a", np.zeros((3, 3)))
    images[1].write_bytes(b"no picture")
    with pytest.raises(DataError, match="01.png: not readable as an image"):
        fid(inception, images, images, StopFlag())


def evaluate(folder: Path, label: str, shift: int, **plan: bool | int) -> tuple[Path, Plan]:
    images, layouts = draw_layouts("quality", 6, 96, (16, 20))
    by_id = {layout.layout_id: image for layout, image in zip(layouts, images, strict=True)}

    def sample(jobs):  # type: ignore[no-untyped-def]
        return Sampled(images=[(by_id[layout.layout_id] // 2 + shift).astype(np.uint8) for layout, _ in jobs])

    run = Run(label=label, kind="teacher", sample=sample)
    whole = Plan(layouts=layouts, **plan)  # type: ignore[arg-type]
    evaluate_run(run, whole, make_parrot(), folder, StopFlag())
    return run_folder(folder, label), whole


def wanted_of(plan: Plan, real: Path | image_quality.Reference, inception: Path) -> dict[str, Any]:
    captions = {layout.layout_id: f"a sign, {layout.lines[0].text}" for layout in plan.layouts}
    return {
        "fid_weights": inception,
        "clip_model": None,
        "real": real,
        "captions": captions,
        "stop": StopFlag(),
    }


def test_a_run_is_measured_once_and_its_figures_kept(inception: Path, clip_folder: Path, tmp_path: Path) -> None:
    truth, _ = evaluate(tmp_path, "true images", 0, keep_all=True)
    run, plan = evaluate(tmp_path, "brighter", 40, keep_all=True)
    wanted = wanted_of(plan, truth, inception) | {"clip_model": clip_folder}
    quality = measure_quality(run, plan, **wanted)
    assert quality["fid"] == pytest.approx(3 * 40**2, rel=1e-2)
    assert 0 <= quality["clip_score"] <= 100
    written = (run / QUALITY_FILE).stat().st_mtime_ns
    assert measure_quality(run, plan, **wanted) == quality
    assert (run / QUALITY_FILE).stat().st_mtime_ns == written
    others = {**wanted, "captions": dict.fromkeys(wanted["captions"], "no words of these")}
    assert measure_quality(run, plan, **others)["clip_score"] != quality["clip_score"]


def test_a_stop_leaves_no_figures_behind(inception: Path, clip_folder: Path, tmp_path: Path) -> None:
    run, plan = evaluate(tmp_path, "true images", 0, keep_all=True)
    wanted = wanted_of(plan, run, inception)
    wanted["stop"].stop_requested = True
    for weights in ({}, {"fid_weights": None, "clip_model": clip_folder}):
        with pytest.raises(Stopped):
            measure_quality(run, plan, **wanted | weights)
    assert not (run / QUALITY_FILE).exists()


def test_images_that_were_not_kept_cannot_be_measured(tmp_path: Path) -> None:
    run, plan = evaluate(tmp_path, "some kept", 0, keep_images=3)
    with pytest.raises(DataError, match="not all of its images were kept"):
        kept_images(run, plan)


def test_fid_is_not_computed_against_a_part_of_the_true_images(inception: Path, tmp_path: Path) -> None:
    run, plan = evaluate(tmp_path, "brighter", 40, keep_all=True, samples_per_layout=2)
    truth, _ = evaluate(tmp_path, "true images", 0, keep_all=True, samples_per_layout=2)
    results = truth / "results.jsonl"
    results.write_bytes(b"".join(results.read_bytes().splitlines(keepends=True)[:-1]))  # stopped before the last
    with pytest.raises(DataError, match="true-images: received 11 images, expected all 12 .*--truth"):
        measure_quality(run, plan, **wanted_of(plan, truth, inception))
    assert not (run / QUALITY_FILE).exists()
    evaluate(tmp_path, "true images", 0, keep_all=True, samples_per_layout=2)
    assert measure_quality(run, plan, **wanted_of(plan, truth, inception))["fid"] == pytest.approx(4800, rel=1e-2)


def write_reference(folder: Path, images: list[NDArray[np.uint8]]) -> Path:
    """Write images each in another size and format, all flat: their mean is the same in any size."""
    folder.mkdir()
    for i, image in enumerate(images):
        mean = image.mean(axis=(0, 1)).round().astype(np.uint8)
        name = ("a.png", "b.JPG", "c.jpeg")[i % 3]
        Image.fromarray(np.tile(mean, (20 + 4 * i, 40 - i, 1))).save(folder / f"{i:02d}{name}", quality=100)
    (folder / "list.txt").write_text("no image")
    return folder


def test_fid_compares_with_a_folder_of_images_of_any_sizes(inception: Path, tmp_path: Path) -> None:
    images, _ = draw_layouts("quality", 6, 96, (16, 20))
    folder = write_reference(tmp_path / "reference", [image // 2 for image in images])
    run, plan = evaluate(tmp_path / "out", "brighter", 40, keep_all=True)
    quality = measure_quality(run, plan, **wanted_of(plan, find_reference(folder), inception))
    assert quality["fid"] == pytest.approx(3 * 40**2, rel=2e-2)
    # Other reference images: what was measured with these does not hold.
    Image.fromarray(np.full((9, 9, 3), 255, np.uint8)).save(folder / "00a.png")
    again = measure_quality(run, plan, **wanted_of(plan, find_reference(folder), inception))
    assert again["fid"] != pytest.approx(quality["fid"], rel=1e-3)


def test_a_reference_folder_without_images_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "one", np.zeros((1, 3)))
    for folder, count in ((tmp_path, 0), (tmp_path / "one", 1), (tmp_path / "nothing", 0)):
        with pytest.raises(DataError, match=rf"evaluate.fid_reference .*: received {count} images, expected"):
            find_reference(folder)


def run_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """Arguments that score sampled images by AnyText-benchmark's file, with a reference folder beside them."""
    folder = tmp_path_factory.mktemp("benchmark")
    images, layouts = draw_layouts("benchmark", 3, 96, (16, 20))
    (folder / "theirs").mkdir()
    entries = []
    for image, layout in zip(images, layouts, strict=True):
        Image.fromarray(image).save(folder / "theirs" / f"{layout.name}_0.png")
        line = {"polygon": [list(corner) for corner in layout.lines[0].polygon], "text": layout.lines[0].text}
        entries.append({"img_name": f"{layout.name}.jpg", "caption": "a sign", "annotations": [line]})
    content = {"data_root": "/data/vdb/nowhere", "data_list": entries}
    (folder / "test1k.json").write_text(json.dumps(content))
    reference = write_reference(folder / "reference", images)
    return (
        *("--images", folder / "theirs", "--annotations", folder / "test1k.json"),
        *("--set", f"evaluate.fid_reference={reference}"),
    )


def test_the_published_protocol_has_fid_against_its_reference_images(
    benchmark: tuple[str | Path, ...], inception: Path, tmp_path: Path
) -> None:
    result = run_command(*benchmark, "--set", f"evaluate.fid_weights={inception}", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "evaluation.json").read_bytes())["runs"]
    assert row["fid"] == pytest.approx(0, abs=2)  # rounded means, and JPEG


def test_a_drawn_run_needs_no_truth_where_there_is_a_reference_folder(
    benchmark: tuple[str | Path, ...], inception: Path, tmp_path: Path
) -> None:
    write_annotations(tmp_path / "held_out.json", *map(annotation, range(2)))
    more = ("--set", f"evaluate.fid_weights={inception}", "--teacher", "trailing:1", *benchmark[-2:])
    command = ("--config", write_teacher(tmp_path), "--annotations", tmp_path / "held_out.json", *more)
    result = run_command(*command, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "out" / "evaluation.json").read_bytes())["runs"]
    assert row["fid"] > 0


def test_an_incomplete_set_of_true_images_is_refused_before_anything_is_drawn(
    inception: Path, tmp_path: Path
) -> None:
    write_annotations(tmp_path / "held_out.json", *map(annotation, range(3)))
    command = (
        *("--config", write_teacher(tmp_path), "--annotations", tmp_path / "held_out.json"),
        *("--out", tmp_path / "out", "--set", f"evaluate.fid_weights={inception}"),
    )
    assert run_command(*command, "--no-teacher", "--truth").exit_code == 0
    results = tmp_path / "out" / "runs" / "true-images" / "results.jsonl"
    results.write_bytes(results.read_bytes().splitlines(keepends=True)[0])
    refused = run_command(*command, "--teacher", "trailing:1")
    assert refused.exit_code == 3
    assert "true-images: received 1 images, expected all 3" in refused.output
    assert not list((tmp_path / "out" / "runs").glob("teacher*"))
    assert run_command(*command, "--teacher", "trailing:1", "--truth").exit_code == 0


@pytest.mark.parametrize("setting", ["evaluate.fid_weights", "evaluate.clip_score_model"])
def test_weights_that_are_none_are_refused_before_anything_is_drawn(
    benchmark: tuple[str | Path, ...], tmp_path: Path, setting: str
) -> None:
    (tmp_path / "none").mkdir()
    refused = run_command(*benchmark, "--set", f"{setting}={tmp_path / 'none'}", "--out", tmp_path / "out")
    assert refused.exit_code == 3
    assert setting in refused.output
    assert not (tmp_path / "out").exists()


def test_a_signal_during_fid_stops_the_command_and_it_goes_on(
    benchmark: tuple[str | Path, ...], inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*benchmark, "--set", f"evaluate.fid_weights={inception}", "--out", tmp_path)
    flags: list[StopFlag] = []

    class Flag(StopFlag):
        def __enter__(self) -> StopFlag:
            flags.append(self)
            return super().__enter__()

    read = image_quality._read

    def read_and_signal(path: Path) -> NDArray[np.uint8]:
        flags[-1].stop_requested = True
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(evaluating, "StopFlag", Flag)
        patched.setattr(image_quality, "_read", read_and_signal)
        stopped = run_command(*command)
    assert stopped.exit_code == 75, stopped.output
    assert "FID is not yet computed: run the same command again to go on" in stopped.output
    assert not list(tmp_path.glob("runs/*/quality.json"))
    assert run_command(*command).exit_code == 0
    assert list(tmp_path.glob("runs/*/quality.json"))


def test_the_clip_scores_caption_is_the_annotated_one(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [annotation(0, wm_score=0.1), annotation(1, wm_score=0.9), annotation(2)]
    write_annotations(tmp_path / "held_out.json", *entries)
    seen: list[str] = []

    def note(folder: Path, sampled: list[Path], captions: list[str], stop: StopFlag) -> float:
        seen.extend(captions)
        return 1.0

    monkeypatch.setattr(image_quality, "clip_score", note)
    result = run_command(
        *("--config", write_teacher(tmp_path), "--annotations", tmp_path / "held_out.json"),
        *("--teacher", "trailing:1", "--set", f"evaluate.clip_score_model={clip_folder}"),
        *("--out", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    assert seen == [entry["caption"] for entry in entries]
