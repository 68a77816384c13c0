"""What an objective costs, and the table that compares students of equal cost."""

from __future__ import annotations

import base64
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.comparison import Kind, cells, describe_solve, format_rows, make_rows, write_page
from bench.objectives import parse_objective, plan_arms, samples_of
from bench.students import Bench, label_of, load_kid, setting
from common.config import PROJECT_ROOT, load_config
from common.errors import UsageError
from common.layouts import Layout, Line
from common.schedule import trailing_timesteps
from stage2_student.evaluation.endpoint import Distance, SquareErrors
from stage2_student.evaluation.image_features import FEATURES_FILE, load_features
from stage2_student.evaluation.kernel_distance import kernel_distance
from stage2_student.evaluation.reading import LineResult
from stage2_student.evaluation.results import RESULTS_FILE, ImageResult, open_results, save_layouts
from stage2_student.evaluation.runs import run_folder
from stage2_student.student.shard_facts import ShardFacts

TINY = PROJECT_ROOT / "configs" / "tiny.toml"
FACTS = ShardFacts(
    base_fingerprint="0",
    source="rollout",
    record_every=5,
    timesteps=tuple(trailing_timesteps(8).tolist()),
    num_rollouts=1,
    has_predictions=False,
)
LAYOUTS, RED, BLUE = 12, (255.0, 0.0, 0.0), (0.0, 0.0, 255.0)


def options(*objectives: str, steps: int = 300) -> Namespace:
    given = {"config": TINY, "set": ["train.batch_size=12"], "shards": Path("usual")}
    return Namespace(**given, objectives=objectives, phases=[4, 2], steps=steps)


def facts_of(shards: Path) -> ShardFacts:
    """Those of the usual set, and of one that `lcm` trains on."""
    return FACTS if shards.name == "usual" else replace(FACTS, source="noised", has_predictions=True)


def test_all_arms_cost_the_same() -> None:
    texts = ("phased", "pcm", "unrolled", "unrolled,batch_size=3", "phased,loss=landing>unrolled")
    arms = plan_arms(options(*texts), facts_of)
    assert [arm.text for arm in arms] == [*texts, *texts] and {arm.phases for arm in arms[:5]} == {4}
    for arm in arms:
        cost = 0.0
        for stage in arm.stages:
            sets = [f"train.{key}={value}" for key, value in stage.settings.items()]
            train = load_config(TINY, ["train.batch_size=12", *sets]).train
            cost += train.max_steps * samples_of(train) * stage.work.passes(train)
            assert train.warmup_steps == round(train.max_steps / 10)
        assert cost == pytest.approx(300 * 12 * 2.5, rel=0.01), arm.text
    steps = [[stage.settings["max_steps"] for stage in arm.stages] for arm in arms]
    assert steps[:5] == [[300], [214], [75], [300], [150, 38]]
    assert steps[5:] == [[300], [214], [150], [600], [150, 75]]
    assert arms[4].names(7) == ["phased-loss-landing-150-4-7", "phased-loss-landing-150-then-unrolled-38-4-7"]


def test_an_arm_may_have_shards_and_settings_of_other_sections_of_its_own() -> None:
    usual, rank, noised = plan_arms(options("phased", "phased,lora.rank=4", "lcm,shards=noised"), facts_of)[:3]
    assert rank.stages[0].settings == {**usual.stages[0].settings, "lora.rank": "4"}
    assert "shards" not in noised.stages[0].settings and noised.stages[0].settings["max_steps"] == 214
    assert (usual.stages[0].shards, noised.stages[0].shards) == (None, Path("noised").absolute())
    assert (setting("lora.rank", 4), setting("seed", 1)) == ("lora.rank=4", "train.seed=1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phased,loss", "expected OBJECTIVE"),
        (">phased", "expected OBJECTIVE"),
        ("phasd", "phasd"),
        ("x0", "one-step predictions"),
    ],
)
def test_an_objective_that_cannot_be_trained_is_refused_before_anything_is(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_arms(options("phased", text), facts_of)
    assert parse_objective("pcm,loss=l2") == {"objective": "pcm", "loss": "l2"}


def evaluate(folder: Path, label: str, squares: np.ndarray, right: int, feature: float) -> None:
    """Write results as `evaluate` does: squared errors by layout, and how many of the lines were read."""
    place = run_folder(folder, label)
    place.mkdir(parents=True)
    random = np.random.default_rng(int(1000 * feature))
    features, results = [], []
    for number, square in enumerate(squares.tolist()):
        read = {"text": "A", "read": "A" if number < right else "", "confidence": 1.0, "height": 9.0}
        color = RED if number % 2 else BLUE
        line = LineResult(**read, color=color, found_color=color if number < right else None)  # type: ignore[arg-type]
        distance = Distance(latents=SquareErrors(whole=square, inside=None, outside=square), psnr=None)
        costs = {"seconds": 0.1, "unet_evaluations": 2.0, "writenet_evaluations": 1.0}
        where = {"layout_id": f"l{number:02d}", "sample": 0}
        results.append(ImageResult(**where, lines=(line,), image="", distance=distance, **costs))  # type: ignore[arg-type]
        values = base64.b64encode((random.normal(size=5) + feature).astype("<f4").tobytes()).decode()
        features.append(f'{{"layout_id":"l{number:02d}","sample":0,"detector":"d","values":"{values}"}}\n')
    with open_results(place / RESULTS_FILE) as writer:
        writer.append(*results)
    (place / FEATURES_FILE).write_text("".join(features))


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """The true images, the solve, and two kinds of students of two seeds each; the second kind is twice as far."""
    folder = tmp_path / "evaluation"
    layouts = [
        Layout(
            layout_id=f"l{number:02d}",
            size=(8, 8),
            lines=(Line(text="A", polygon=((0, 0), (8, 0), (8, 8)), color=RED if number % 2 else BLUE),),
        )
        for number in range(LAYOUTS)
    ]
    save_layouts(folder, layouts, {"samples_per_layout": 1})
    squares = np.linspace(0.5, 1.5, LAYOUTS)
    evaluate(folder, "true images", squares, 12, 0.0)
    evaluate(folder, "teacher, 40 steps (as recorded)", 0 * squares, 12, 0.1)
    for seed, factor in ((0, 1.0), (1, 3.0)):
        evaluate(folder, label_of(f"near-{seed}", 2), factor * squares, 9, 0.5 + seed)
        evaluate(folder, label_of(f"far-{seed}", 2), 4 * factor * squares, 6, 2.5 + seed)
    return folder


def kinds() -> list[Kind]:
    return [
        Kind(
            name=name,
            phases=2,
            facts={"steps": "9"},
            labels=[label_of(f"{name}-{seed}", 2) for seed in (0, 1)],
        )
        for name in ("near", "far")
    ]


def test_seeds_are_pooled_and_differences_are_paired_over_layouts(evaluation: Path) -> None:
    near, far = make_rows(evaluation, kinds())
    assert near.error.value == pytest.approx(2**0.5) and far.error.value == pytest.approx(2 * 2**0.5)
    assert near.of_seeds == pytest.approx((1.0, 3**0.5))
    assert near.against.error_ratio is None
    ratio = far.against.error_ratio
    assert ratio is not None and (ratio.low, ratio.value, ratio.high) == pytest.approx((2, 2, 2))
    assert near.error.high - near.error.low > 0.1  # unpaired, it would be as wide
    assert near.sen_acc is not None and near.sen_acc.value == 0.75 and near.sen_acc.count == 24
    less = far.against.sen_acc
    assert less is not None and less.value == -0.25 and less.low < -0.25 < less.high
    assert far.against.color_acc is not None and far.against.color_acc.value == -0.25


def test_kid_of_seeds_is_their_mean_and_its_differences_are_paired(evaluation: Path) -> None:
    near, far = make_rows(evaluation, kinds())
    expected = [(f"l{number:02d}", 0) for number in range(LAYOUTS)]
    truth, *of_seeds = [
        load_features(run_folder(evaluation, label) / FEATURES_FILE, expected)
        for label in ("true images", *kinds()[1].labels)
    ]
    assert truth is not None
    alone = [kernel_distance(truth[1], found[1], 0).value for found in of_seeds if found is not None]
    assert far.kid is not None and far.kid.value == pytest.approx(np.mean(alone))
    assert near.kid is not None and far.against.kid is not None
    assert far.against.kid.value == pytest.approx(far.kid.value - near.kid.value)
    same = load_kid(evaluation, kinds()[1].labels)
    assert same is not None and (same.less(same).low, same.less(same).high) == (0, 0)
    (run_folder(evaluation, kinds()[1].labels[0]) / FEATURES_FILE).unlink()
    assert load_kid(evaluation, kinds()[1].labels) is None


def test_the_table_and_the_page_say_what_was_found(evaluation: Path, tmp_path: Path) -> None:
    rows = make_rows(evaluation, kinds())
    near, far = map(cells, rows)
    assert (near["error"], near["of seeds"], near["error, % more"]) == ("1.4142", "1.0000 to 1.7321", "")
    assert far["error, % more"] == "+100.0 [+100.0, +100.0]" and far["steps"] == "9"
    assert far["Sen. Acc, %"] == "50.0" and far["Sen. Acc, points"].startswith("-25.0 [")
    text = format_rows(rows).splitlines()
    assert len(text) == 3 and text[1].startswith("near") and text[2].startswith("far ")
    solve = describe_solve(evaluation, 40)
    assert solve.startswith("the solve itself: Sen. Acc 100.0 %, colour 100.0 %, KID ")
    write_page(tmp_path, "compared", "Near and far", solve, rows)
    page = (tmp_path / "compared.html").read_text()
    assert page.count("<polyline") == 0 and page.count("<circle") == 2 * (
        3 * 2 + 2
    )  # charts, widths, legend entries
    assert "KID against UNet calls" in page and f"near, 2 UNet calls: {near['KID']}" in page
    assert "+100.0 [+100.0, +100.0]" in page and solve in page
    near, far = json.loads((tmp_path / "compared.json").read_text())
    assert near["against"]["error_ratio"] is None and far["against"]["error_ratio"]["value"] == pytest.approx(2)


def test_a_command_that_fails_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    places = {"shards": tmp_path / "none", "out": tmp_path, "annotations": tmp_path / "none.json"}
    bench = Bench(config=tmp_path / "missing.toml", sets=(), layouts=1, **places)
    with pytest.raises(
        UsageError, match=r"train of one ended with 2: .*missing\.toml.*; all of it is in .*one\.log"
    ):
        bench.train("one", {"num_phases": 2})
