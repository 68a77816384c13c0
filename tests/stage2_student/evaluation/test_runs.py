from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import nn, zeros

from common.errors import DataError, Stopped
from common.layouts import Layout
from common.signals import StopFlag
from stage2_student.evaluation.counting import count_evaluations
from stage2_student.evaluation.image_folder import count_samples, folder_run
from stage2_student.evaluation.judges import Judge
from stage2_student.evaluation.results import load_layouts, load_results, save_layouts, slug
from stage2_student.evaluation.runs import Job, Plan, Run, Sampled, evaluate_run, run_folder
from stage2_student.evaluation.summary import summarise
from stage2_student.evaluation.text_table import format_table
from tests.stage2_student.evaluation.drawn_text import draw_layouts
from tests.stage2_student.evaluation.test_judges import make_parrot

COUNT = 10


@pytest.fixture(scope="module")
def sampled() -> tuple[list[NDArray[np.uint8]], list[Layout]]:
    return draw_layouts("runs", COUNT, 96, (16, 22))


class Painter:
    """Samples the true images, those listed in `spoiled` without their text; counts what it was asked for."""

    def __init__(self, images: Sequence[NDArray[np.uint8]], layouts: Sequence[Layout], spoiled: int = 0) -> None:
        self.images = {layout.layout_id: image for layout, image in zip(layouts, images, strict=True)}
        self.spoiled = {layout.layout_id for layout in layouts[:spoiled]}
        self.asked: list[tuple[str, int]] = []
        self.stop_after = 10**9
        self.stop = StopFlag()

    def __call__(self, jobs: Sequence[Job]) -> Sampled:
        self.asked += [(layout.layout_id, sample) for layout, sample in jobs]
        if len(self.asked) >= self.stop_after:
            self.stop.stop_requested = True
        images = [self.images[layout.layout_id] for layout, _ in jobs]
        images = [
            np.full_like(image, 128) if layout.layout_id in self.spoiled else image
            for image, (layout, _) in zip(images, jobs, strict=True)
        ]
        return Sampled(
            images=images,
            seconds=0.5 * len(jobs),
            unet_evaluations=40 * len(jobs),
            writenet_evaluations=2 * len(jobs),
        )


def run_of(painter: Painter, label: str = "teacher, 20 steps", **settings: object) -> Run:
    return Run(label=label, kind="teacher", sample=painter, steps=20, settings=settings)


SETTINGS = {"seed": 0, "samples_per_layout": 1, "judge": "ppocr_v4"}


def test_a_stopped_evaluation_goes_on_where_it_was_and_ends_as_one_that_was_not_stopped(
    sampled: tuple[list[NDArray[np.uint8]], list[Layout]], judge: Judge, tmp_path: Path
) -> None:
    images, layouts = sampled
    plan = Plan(layouts=layouts, batch_size=4)
    whole = evaluate_run(run_of(Painter(images, layouts)), plan, judge, tmp_path / "whole", StopFlag())

    stopped = Painter(images, layouts)
    stopped.stop_after = 4
    with pytest.raises(Stopped, match="4 of 10 images"):
        evaluate_run(run_of(stopped), plan, judge, tmp_path / "parts", stopped.stop)
    results = run_folder(tmp_path / "parts", "teacher, 20 steps") / "results.jsonl"
    with results.open("ab") as file:  # a crash in the middle of a line
        file.write(b'{"layout_id":"runs-004","li')
    again = Painter(images, layouts)
    parts = evaluate_run(run_of(again), plan, judge, tmp_path / "parts", StopFlag())
    assert [name for name, _ in again.asked] == [layout.layout_id for layout in layouts[4:]]
    assert parts == whole
    assert (
        results.read_bytes()
        == (run_folder(tmp_path / "whole", "teacher, 20 steps") / "results.jsonl").read_bytes()
    )

    done = Painter(images, layouts)
    assert evaluate_run(run_of(done), plan, judge, tmp_path / "parts", StopFlag()) == whole
    assert done.asked == []


def test_results_of_other_settings_are_not_mixed_in(
    sampled: tuple[list[NDArray[np.uint8]], list[Layout]], judge: Judge, tmp_path: Path
) -> None:
    images, layouts = sampled
    plan = Plan(layouts=layouts[:2])
    painter = Painter(images, layouts)
    evaluate_run(run_of(painter, guidance_scale=7.5), plan, judge, tmp_path, StopFlag())
    with pytest.raises(DataError, match=r"settings\.guidance_scale: received 9\.0, expected 7\.5"):
        evaluate_run(run_of(painter, guidance_scale=9.0), plan, judge, tmp_path, StopFlag())

    save_layouts(tmp_path, layouts, SETTINGS)
    save_layouts(tmp_path, layouts, SETTINGS)
    with pytest.raises(DataError, match=r"what is evaluated differs \(count: received 9"):
        save_layouts(tmp_path, layouts[1:], SETTINGS)
    with pytest.raises(DataError, match=r"what is evaluated differs \(settings.seed"):
        save_layouts(tmp_path, layouts, {**SETTINGS, "seed": 1})


def test_layouts_come_back_as_they_were_saved(
    sampled: tuple[list[NDArray[np.uint8]], list[Layout]], tmp_path: Path
) -> None:
    save_layouts(tmp_path, sampled[1], SETTINGS)
    assert load_layouts(tmp_path) == (sampled[1], SETTINGS)


def test_a_layout_given_twice_is_refused(sampled: tuple[list[NDArray[np.uint8]], list[Layout]]) -> None:
    with pytest.raises(DataError, match="runs-000: received twice"):
        Plan(layouts=[sampled[1][0], sampled[1][0]])


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"layout_id": "a"}\n')
    with pytest.raises(DataError, match="results.jsonl, line 1"):
        load_results(tmp_path / "results.jsonl")


def test_the_first_images_are_kept(
    sampled: tuple[list[NDArray[np.uint8]], list[Layout]], judge: Judge, tmp_path: Path
) -> None:
    images, layouts = sampled
    plan = Plan(layouts=layouts[:3], samples_per_layout=2, keep_images=2)
    results = evaluate_run(run_of(Painter(images, layouts)), plan, judge, tmp_path, StopFlag())
    assert [result.image for result in results] == ["runs-000_0.png", "", "runs-001_0.png", "", "", ""]
    kept = run_folder(tmp_path, "teacher, 20 steps") / "images"
    assert sorted(path.name for path in kept.iterdir()) == ["runs-000_0.png", "runs-001_0.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(kept / "runs-000_0.png")), images[0])


def test_the_summary_has_accuracies_costs_heights_and_differences(
    sampled: tuple[list[NDArray[np.uint8]], list[Layout]], judge: Judge, tmp_path: Path
) -> None:
    images, layouts = sampled
    layouts = [
        replace(layout, lines=tuple(replace(line, in_glyph_map=place >= 5) for line in layout.lines))
        for place, layout in enumerate(layouts)
    ]
    save_layouts(tmp_path, layouts, SETTINGS)
    plan = Plan(layouts=layouts)
    evaluate_run(run_of(Painter(images, layouts), "good"), plan, judge, tmp_path, StopFlag())
    evaluate_run(run_of(Painter(images, layouts, spoiled=4), "worse"), plan, judge, tmp_path, StopFlag())
    unfinished = Painter(images, layouts)
    unfinished.stop_after = 0
    unfinished.stop.stop_requested = True
    with pytest.raises(Stopped):
        evaluate_run(run_of(unfinished, "unfinished"), plan, judge, tmp_path, unfinished.stop)

    table = format_table(summarise(tmp_path))
    summary = json.loads((tmp_path / "evaluation.json").read_bytes())
    good, worse = summary["runs"]
    assert (good["label"], worse["label"]) == ("good", "worse")
    assert summary["incomplete"] == ["unfinished"]
    assert "not complete, left out: unfinished" in table
    assert good["sen_acc"] == {"value": 1.0, "low": 1.0, "high": 1.0, "count": COUNT}
    assert good["color_acc"]["value"] == 1.0
    assert worse["sen_acc"]["value"] == pytest.approx(0.6)
    assert worse["sen_acc"]["low"] < 0.6 < worse["sen_acc"]["high"]
    assert worse["ned"]["value"] == pytest.approx(0.6, abs=1e-4)
    assert worse["color_acc"]["value"] == pytest.approx(0.6)
    assert sum(row["sen_acc"]["count"] for row in worse["by_height"]) == COUNT
    for row in worse["by_height"]:
        assert row["from"] < (row["to"] or float("inf"))
    for run, out_of_it in ((good, 1.0), (worse, 0.2)):
        assert [(row["in_glyph_map"], row["sen_acc"]["count"]) for row in run["by_map"]] == [(True, 5), (False, 5)]
        assert [row["sen_acc"]["value"] for row in run["by_map"]] == pytest.approx([1.0, out_of_it])
    assert (good["unet_evaluations"], good["writenet_evaluations"], good["seconds_per_image"]) == (40, 2, 0.5)
    (difference,) = summary["differences"]
    assert (difference["run"], difference["less"]) == ("worse", "good")
    assert difference["sen_acc"]["value"] == pytest.approx(-0.4)
    assert difference["sen_acc"]["high"] < 0
    assert not {"fid", "clip_score"} & good.keys()  # not measured


def test_a_folder_without_a_complete_run_has_no_summary(
    sampled: tuple[list[NDArray[np.uint8]], list[Layout]], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="layouts.json"):
        summarise(tmp_path)
    save_layouts(tmp_path, sampled[1], SETTINGS)
    with pytest.raises(DataError, match="no run is complete"):
        summarise(tmp_path)


def test_a_folder_of_images_is_scored_by_the_benchmarks_names(
    sampled: tuple[list[NDArray[np.uint8]], list[Layout]], judge: Judge, tmp_path: Path
) -> None:
    images, layouts = sampled[0][:3], sampled[1][:3]
    for image, layout in zip(images, layouts, strict=True):
        for sample in range(2):
            shown = image if sample == 0 else np.full_like(image, 90)
            Image.fromarray(shown).save(tmp_path / f"{layout.name}_{sample}.jpg", quality=95)
    samples = count_samples(tmp_path, layouts)
    assert samples == 2
    plan = Plan(layouts=layouts, samples_per_layout=samples)
    run = folder_run(tmp_path, "theirs", plan.jobs())
    results = evaluate_run(run, plan, judge, tmp_path / "out", StopFlag())
    assert [all(line.exact for line in result.lines) for result in results] == [True, False] * 3
    assert all(result.unet_evaluations == 0 for result in results)


def test_a_folder_of_other_images_is_refused_whatever_its_name(tmp_path: Path) -> None:
    _, layouts = draw_layouts("folders", 2, 96, (16, 22))
    plan = Plan(layouts=layouts)

    def write(folder: Path, level: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for layout in layouts:
            Image.fromarray(np.full((96, 96, 3), level, np.uint8)).save(folder / f"{layout.name}_0.png")
        return folder

    def score(folder: Path) -> None:
        evaluate_run(folder_run(folder, "theirs", plan.jobs()), plan, make_parrot(), tmp_path / "out", StopFlag())

    first, second = write(tmp_path / "a" / "theirs", 10), write(tmp_path / "b" / "theirs", 20)
    score(first)
    score(first)
    with pytest.raises(DataError, match=r"run 'theirs' differs \(settings.*give another --out"):
        score(second)
    write(first, 20)  # sampled again in place
    with pytest.raises(DataError, match=r"run 'theirs' differs \(settings.*give another --out"):
        score(first)
    (write(first, 10) / "unrelated.txt").write_text("not scored")
    score(first)


def test_an_image_that_changes_while_it_is_scored_is_refused(tmp_path: Path) -> None:
    _, layouts = draw_layouts("folders", 1, 96, (16, 22))
    path = tmp_path / "word000_0.png"
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(path)
    run = folder_run(tmp_path, "theirs", [(layouts[0], 0)])
    Image.fromarray(np.ones((96, 96, 3), np.uint8)).save(path)
    with pytest.raises(DataError, match=r"word000_0.png: changed while the folder was being scored"):
        run.sample([(layouts[0], 0)])


def test_a_missing_or_broken_image_of_a_folder_is_named(
    sampled: tuple[list[NDArray[np.uint8]], list[Layout]], judge: Judge, tmp_path: Path
) -> None:
    images, layouts = sampled[0][:2], sampled[1][:2]
    with pytest.raises(DataError, match="no such folder"):
        count_samples(tmp_path / "nothing", layouts)
    with pytest.raises(DataError, match="word000_0.jpg is missing"):
        count_samples(tmp_path, layouts)
    Image.fromarray(images[0]).save(tmp_path / "word000_0.jpg")
    with pytest.raises(DataError, match="word001_0.jpg is missing"):
        count_samples(tmp_path, layouts)
    (tmp_path / "word001_0.jpg").write_bytes(b"\xff\xd8 no picture")
    assert count_samples(tmp_path, layouts) == 1
    plan = Plan(layouts=layouts)
    with pytest.raises(DataError, match="word001_0.jpg: not readable"):
        evaluate_run(folder_run(tmp_path, "x", plan.jobs()), plan, judge, tmp_path / "out", StopFlag())


def test_evaluations_are_counted_by_sample_and_watching_leaves_no_trace() -> None:
    module = nn.Linear(3, 3)
    with count_evaluations(unet=module) as counts:
        module(zeros(4, 3))
        module(input=zeros(2, 3))
    module(zeros(8, 3))
    assert counts == {"unet": 6}
    assert not module._forward_pre_hooks


def test_labels_become_safe_folder_names() -> None:
    assert slug("teacher, 20 steps (upstream)") == "teacher-20-steps-upstream"
    assert slug("../..") == "run"
