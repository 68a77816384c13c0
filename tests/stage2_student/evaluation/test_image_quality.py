"""FID and CLIP score with networks of the right interface and random weights: the arithmetic and the paths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from common.errors import DataError
from common.signals import StopFlag
from stage2_student.evaluation.image_quality import clip_score, fid, kept_images, measure_quality
from stage2_student.evaluation.layouts import Layout
from stage2_student.evaluation.runs import Drawn, Plan, Run, evaluate_run, run_folder
from stage2_student.evaluation.summary import QUALITY_FILE
from tests.stage2_student.evaluation.drawn_text import draw_layouts
from tests.stage2_student.evaluation.test_recognizers import make_parrot

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
    assert fid(inception, real, real) == pytest.approx(0, abs=1e-2)
    assert fid(inception, real, moved) == pytest.approx(30**2, rel=1e-3)  # equal covariances, means 30 apart


def test_the_clip_score_is_that_of_image_and_caption(clip_folder: Path, tmp_path: Path) -> None:
    paths = write_images(tmp_path / "a", np.array([[255.0, 0, 0], [0, 0, 255.0], [9, 9, 9]]))
    captions = ["a red sign", "a blue sign", "many words " * 100]
    each = [clip_score(clip_folder, [path], [caption]) for path, caption in zip(paths, captions, strict=True)]
    assert clip_score(clip_folder, paths, captions) == pytest.approx(np.mean(each), abs=1e-3)
    assert all(0 < score < 100 for score in each)
    assert clip_score(clip_folder, paths[:1], ["something else"]) != pytest.approx(each[0], abs=1e-4)


def test_weights_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"no TorchScript")
    images = write_images(tmp_path / "a", np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"evaluate.fid_weights .*weights.pt.*inception-2015-12-05.pt"):
        fid(tmp_path / "weights.pt", images, images)
    with pytest.raises(DataError, match="evaluate.clip_score_model"):
        clip_score(tmp_path / "a", images, ["a", "b"])


def evaluate(folder: Path, label: str, shift: int, **plan: bool | int) -> tuple[Path, list[Layout]]:
    images, layouts = draw_layouts("quality", 6, 96, (16, 20))
    by_id = {layout.layout_id: image for layout, image in zip(layouts, images, strict=True)}

    def draw(jobs):  # type: ignore[no-untyped-def]
        return Drawn(images=[(by_id[layout.layout_id] // 2 + shift).astype(np.uint8) for layout, _ in jobs])

    run = Run(label=label, kind="teacher", draw=draw)
    evaluate_run(run, Plan(layouts=layouts, **plan), make_parrot(), folder, StopFlag())  # type: ignore[arg-type]
    return run_folder(folder, label), layouts


def test_a_run_is_measured_once_and_its_figures_kept(inception: Path, clip_folder: Path, tmp_path: Path) -> None:
    truth, _ = evaluate(tmp_path, "true images", 0, keep_all=True)
    run, layouts = evaluate(tmp_path, "brighter", 40, keep_all=True)
    wanted = {"fid_weights": inception, "clip_model": clip_folder, "truth": truth}
    quality = measure_quality(run, layouts, **wanted)
    assert quality["fid"] == pytest.approx(3 * 40**2, rel=1e-2)
    assert 0 <= quality["clip_score"] <= 100
    written = (run / QUALITY_FILE).stat().st_mtime_ns
    assert measure_quality(run, layouts, **wanted) == quality
    assert (run / QUALITY_FILE).stat().st_mtime_ns == written


def test_images_that_were_not_kept_cannot_be_measured(tmp_path: Path) -> None:
    run, _ = evaluate(tmp_path, "some kept", 0, keep_images=3)
    with pytest.raises(DataError, match="not all of its images were kept"):
        kept_images(run)
