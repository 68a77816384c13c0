from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.anytext2.checkpoint import write_checkpoint
from common.anytext2.checkpoint_file import CheckpointFile
from common.ddim import trailing_grid
from common.errors import DataError, Stopped, UsageError
from common.schedule import make_alphas_cumprod
from shards.files.failures import read_failures
from shards.files.tasks import Task
from shards.looking.finalize import finalize
from shards.reading.reader import ShardSet
from stage1_teacher.inputs.files import open_inputs
from stage1_teacher.inputs.fonts import font_sha256
from stage1_teacher.inputs.input import InputFailure
from stage1_teacher.inputs.prompts import Prompts
from stage1_teacher.precompute import Done, precompute
from stage1_teacher.recording.identity import build_identity
from stage1_teacher.recording.recorder import Recorder
from stage1_teacher.recording.shard_maker import group_by_rendered
from stage1_teacher.rendering.rendered_input import render_input
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.solver import solve
from stage1_teacher.teacher.teacher import Teacher
from tests.stage1_teacher.small_teacher import (
    DATA,
    FONT,
    ROOT,
    annotation,
    load,
    write_annotations,
    write_prompts,
    write_teacher,
)


@dataclass
class Place:
    """A small teacher with its configuration, and inputs for it: 4 annotations and 3 prompts, 3 shards."""

    config: Path
    annotations: Path
    prompts: Path

    def run(self, out: Path, *overrides: str, **options: object) -> Done:
        options = {"annotations": [self.annotations], "prompts": [self.prompts]} | options
        return precompute(load(self.config, *overrides), out, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("small")
    config = write_teacher(folder)
    entries = [annotation(number, wm_score=0.9 if number == 1 else 0.1) for number in range(4)]
    annotations = write_annotations(folder / "data.json", *entries)
    return Place(config, annotations, write_prompts(folder / "prompts.jsonl", 3))


@pytest.fixture(scope="module")
def finished(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set made by one task without any interruption."""
    out = tmp_path_factory.mktemp("finished") / "shards"
    done = place.run(out)
    assert done == Done(
        shards_planned=3, shards_found=0, shards_written=3, shards_without_inputs=0, records=7, failed=0
    )
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Return a set's files but the lock, dead writers' leftovers, and of the manifest the identity alone."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files if ".work" not in path.parts}
    identity = json.loads(found.pop("manifest.json"))["identity"]
    found.pop(".lock", None)
    return found | {"identity": json.dumps(identity).encode()}


def when_committed(shard: Path, act: Callable[[], None]) -> threading.Thread:
    """Do something as soon as a shard is committed."""

    def wait() -> None:
        while not shard.with_suffix(".json").exists():
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_inputs_become_a_set_that_finalizes_and_reads(place: Place, finished: Path) -> None:
    summary = finalize(finished)
    (finished / "summary.json").unlink()
    assert (summary.shards, summary.samples, summary.failed) == (3, 7, 0)
    records = list(ShardSet.open(finished))
    assert [record.meta.texts for record in records] == [(f"No {n}",) for n in range(4)] + [
        (f"P{n}",) for n in range(3)
    ]
    assert {record.meta.mode for record in records[:4]} == {"generate", "edit"}  # edit_fraction is one half
    assert {record.meta.mode for record in records[4:]} == {"generate"}
    assert records[1].meta.caption == "sign 1 with watermarks . , fine"
    assert [len(record.image_context) // 77 for record in records] == [1, 1, 1, 1, 1, 2, 1]
    for record in records:
        assert record.rollout_timesteps.tolist() == [999, 499]
        assert record.rollout_latents.shape == (1, 3, 4, 8, 8)
        assert record.x0_cond is None
        assert record.meta.guidance_scale == 3.0
        assert record.glyphs.any() and record.positions.max() == 1


def test_the_manifest_says_what_decides_the_records_and_no_paths(finished: Path) -> None:
    identity = ShardSet.open(finished).manifest.identity
    assert identity["timesteps"] == [999, 499]
    assert identity["solver"]["timesteps"] == [999, 749, 499, 249]
    assert torch.equal(torch.tensor(identity["alphas_cumprod"]), make_alphas_cumprod())
    assert identity["config"]["precompute"]["num_rollouts"] == 1
    assert len(identity["base_fingerprint"]) == len(identity["fonts"]["default"]) == 64
    assert "/" not in json.dumps(identity)


def test_a_record_is_what_the_teacher_saw_and_did_to_the_bit(place: Place, tmp_path: Path) -> None:
    place.run(tmp_path / "out", "precompute.batch_size=1", limit=2)
    teacher, shards = Teacher.load(load(place.config)), ShardSet.open(tmp_path / "out")
    for record in shards:
        noise = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(record.meta.seeds[0]))
        assert torch.equal(record.rollout_latents[0, 0], noise.half())
        rollout = solve(
            teacher,
            [record.conditioning],
            shards.uncond,
            record.rollout_latents[0, :1],
            trailing_grid(4),
            guidance_scale=3.0,
            keep=(0, 2),
        )
        assert torch.equal(rollout.states[0], record.rollout_latents[0])


def test_batches_are_filled_with_what_can_be_drawn(place: Place) -> None:
    prompts = Prompts(place.prompts, size=64, fonts={})
    rendered = render_input(prompts[0], RenderSettings.from_config(load(place.config)))
    failed = InputFailure("bad text", "x")
    outcomes = [failed, rendered, failed, rendered, rendered, failed, rendered, rendered, failed, failed]
    groups = list(group_by_rendered(iter(outcomes), 9, batch_size=2))
    assert [len(group) for group in groups] == [4, 3, 2]
    assert [item for group in groups for item in group] == outcomes[:9]


def test_the_same_seed_gives_the_same_bytes_with_one_task_or_three(
    place: Place, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "three"
    others = Task(out, 0, 3)  # that two more tasks live, and claim their shares
    with others:
        for name in ("shard-000000", "shard-000001"):
            assert others.claim(name) is None
        done = place.run(out, task_index=2, num_tasks=3)
        assert (done.shards_written, done.shards_found) == (1, 0)
        assert not (out / "shard-000000.json").exists()
        others.release("shard-000001")
        done = place.run(out, task_index=1, num_tasks=3)
        assert (done.shards_written, done.shards_found) == (1, 0)
    done = place.run(out, task_index=2, num_tasks=3)  # whose share is done: it takes what nobody makes any more
    assert (done.shards_written, done.shards_found) == (1, 1)
    assert contents(out) == contents(finished)


def test_a_run_that_is_killed_and_started_again_gives_the_same_bytes(
    place: Place, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.argv[0] = 'pipeline.py'; from pipeline import cli; cli()"
    )
    arguments = ["precompute", "--config", place.config, "--annotations", place.annotations]
    arguments += ["--prompts", place.prompts, "--out", out]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT)
    when_committed(out / "shard-000000.tar", process.kill)
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert not (out / "shard-000002.json").exists()
    first = (out / "shard-000000.tar").stat()
    assert place.run(out).shards_found >= 1
    again = (out / "shard-000000.tar").stat()
    assert (first.st_ino, first.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)
    assert contents(out) == contents(finished)
    done = place.run(out)
    assert (done.shards_written, done.shards_found) == (0, 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_everything_finished_committed(
    place: Place, finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "stopped"
    thread = when_committed(out / "shard-000000.tar", lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match=r"[12] of this task's 3 shards are committed"):
        place.run(out)
    thread.join()
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
    place.run(out)
    assert contents(out) == contents(finished)


def test_inputs_added_later_extend_the_set_and_change_nothing_in_it(
    place: Place, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "grown"
    place.run(out, limit=4)
    before = contents(out)
    assert place.run(out).shards_planned == 3  # 4 inputs make 2 shards, 3 more make another
    after = contents(out)
    assert {name: after[name] for name in before} == before
    assert len(ShardSet.open(out)) == 7
    moved = place.annotations.parent / "elsewhere.json"
    moved.write_bytes(place.annotations.read_bytes())
    assert place.run(out, annotations=[moved]).shards_written == 0
    assert [r.meta.input_id for r in ShardSet.open(out)] == [r.meta.input_id for r in ShardSet.open(finished)]


def test_shards_whose_inputs_are_not_given_are_left_alone(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "partial"
    with pytest.raises(DataError, match="max_failures"):
        place.run(out, "precompute.max_failures=0", annotations=[], prompts=[bad_prompts(tmp_path)])
    done = place.run(out, annotations=[], limit=1)
    assert (done.shards_without_inputs, done.shards_written) == (2, 1)
    assert "give the files of earlier runs too" in caplog.text


def bad_prompts(folder: Path) -> Path:
    """Four prompts of which the first and the third fail."""
    path = write_prompts(folder / "bad.jsonl", 4, first=10)
    lines = path.read_text().splitlines()
    lines[0] = json.dumps({"caption": "x", "lines": [{"text": "", "box": [1, 1, 9, 9]}]})
    lines[2] = json.dumps({"caption": "x", "lines": [{"text": "far", "box": [90, 90, 99, 99]}]})
    path.write_text("\n".join(lines))
    return path


def test_inputs_that_fail_are_recorded_and_the_others_go_on(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = place.run(out, annotations=[], prompts=[bad_prompts(tmp_path)])
    assert (done.records, done.failed) == (2, 2)
    failures = list(read_failures(out))
    assert [(failure.sample_index, failure.reason) for failure in failures] == [
        (0, "empty text"),
        (2, "bad polygon"),
    ]
    assert failures[1].message == "bad.jsonl:3: line 'far': polygon lies outside the image"
    shards = ShardSet.open(out)
    assert [shards.key(index) for index in range(len(shards))] == ["000000001", "000000003"]
    assert finalize(out).failures == {"empty text": 1, "bad polygon": 1}


def test_inputs_that_are_equal_are_one_record_and_that_is_said(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = write_prompts(tmp_path / "equal.jsonl", 2)
    prompts.write_text(prompts.read_text() * 2)
    assert place.run(tmp_path / "out", "precompute.solver_steps=2", annotations=[], prompts=[prompts]).records == 2
    (said,) = [message for message in caplog.messages if "become one record" in message]
    assert said.startswith("2 of 4 inputs say the same as an earlier one")
    assert "first equal.jsonl:3, as equal.jsonl:1" in said


def write_lacking(folder: Path, count: int, *lacking: int) -> Path:
    """Prompts of which some ask for Hebrew in a font that has none."""
    path = write_prompts(folder / "lacking.jsonl", count, first=20)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for place in lacking:
        lines[place]["lines"][0] |= {"text": "שלום", "font": str(FONT.with_name("Roboto-Bold.ttf"))}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_inputs_that_no_font_can_render_do_not_count_as_bad_ones(place: Place, tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", write_lacking(tmp_path, 11, 0)
    overrides = ("precompute.max_failures=0", "shards.samples_per_shard=1", "precompute.solver_steps=2")
    few = {"annotations": [], "prompts": [prompts], "limit": 2}
    with pytest.raises(UsageError, match=r"^1 of the first 2 inputs have a line that no font can render.*: ש ל "):
        place.run(out, *overrides, **few)
    assert not (out / "manifest.json").exists()  # nor was a teacher loaded
    done = place.run(out, *overrides, annotations=[], prompts=[prompts])
    assert (done.records, done.failed, done.lacking) == (10, 1, 1)
    failure, *others = read_failures(out)
    assert not others
    assert (failure.sample_index, failure.reason) == (0, "font lacks characters")
    assert "lacking.jsonl:1: line 'שלום': font Roboto-Bold.ttf lacks ש (U+05E9)" in failure.message
    done = place.run(out, *overrides, **few)  # a finished set is not looked at again
    assert (done.shards_written, done.failed, done.lacking) == (0, 1, 1)
    more = write_prompts(tmp_path / "more.jsonl", 1, first=40)
    assert place.run(out, *overrides, annotations=[], prompts=[prompts, more]).records == 1


def test_fallback_fonts_are_part_of_the_identity_where_there_are_any(place: Place, tmp_path: Path) -> None:
    def identity(*overrides: str) -> dict[str, Any]:
        config = load(place.config, *overrides)
        return build_identity(config, RenderSettings.from_config(config))

    fallback = f'inputs.fallback_fonts=["{FONT}"]'
    assert "fallback" not in json.dumps(identity())
    with_fallback = identity(fallback)
    assert with_fallback["fonts"].pop("fallback") == [font_sha256(FONT)]
    assert with_fallback == identity()
    prompts = write_lacking(tmp_path, 2, 0, 1)
    done = place.run(tmp_path / "out", fallback, "precompute.solver_steps=2", annotations=[], prompts=[prompts])
    assert (done.records, done.failed) == (2, 0)


def test_too_many_failures_stop_the_run_and_keep_what_is_committed(place: Place, tmp_path: Path) -> None:
    out, overrides = tmp_path / "out", ("precompute.max_failures=1", "shards.samples_per_shard=1")
    with pytest.raises(
        DataError, match=r"2 inputs of this task failed, precompute.max_failures is 1; .*bad\.jsonl:3"
    ):
        place.run(out, *overrides, annotations=[], prompts=[bad_prompts(tmp_path)])
    kept = {path.name for path in out.glob("shard-*.json")}
    assert kept == {"shard-000000.json", "shard-000001.json"}  # one without a record, one with
    assert [failure.reason for failure in read_failures(out)] == ["empty text"]
    with pytest.raises(DataError, match="2 inputs of this task failed"):
        place.run(out, *overrides, annotations=[], prompts=[bad_prompts(tmp_path)])
    overrides = ("precompute.max_failures=2", *overrides[1:])
    assert place.run(out, *overrides, annotations=[], prompts=[bad_prompts(tmp_path)]).shards_written == 2


def test_every_kind_of_bad_annotation_is_a_recorded_failure(place: Place, tmp_path: Path) -> None:
    images = tmp_path / "imgs"
    images.mkdir()
    whole = (DATA / "imgs" / "a.png").read_bytes()
    for name in ("a.png", "b.png", "c.png"):
        (images / name).write_bytes(whole)
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "text.png").write_bytes(b"no image at all")
    (images / "empty.png").write_bytes(b"")
    (tmp_path / "secret.png").write_bytes(whole)
    polygon = {"text": "x", "language": "Latin"}
    entries = [
        annotation(0, img_name="none.png"),
        annotation(1, img_name="cut.png"),
        annotation(2, img_name="text.png"),
        annotation(3, img_name="empty.png"),
        annotation(4, img_name="../secret.png"),
        annotation(5, annotations=[polygon | {"polygon": [[900, 900], [990, 900], [990, 990]]}]),
        annotation(6, annotations=[polygon | {"polygon": [[1, 1], [9, 9]]}]),
        annotation(7, annotations=[polygon | {"polygon": [[1, 1], [5, 5], [9, 9]]}]),
        annotation(8, annotations=[polygon | {"polygon": [[1, 1], [90, 1], [90, 90]], "text": ""}]),
        annotation(9, img_name="a.png", caption="many words. " * 1000),
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"data_root": "imgs", "data_list": entries}))
    out = tmp_path / "out"
    done = place.run(out, annotations=[path], prompts=[])
    assert (done.records, done.failed) == (1, 9)
    assert [failure.reason for failure in read_failures(out)] == [
        "image missing",
        *["image unreadable"] * 3,
        "image outside its folder",
        *["bad polygon"] * 3,
        "empty text",
    ]
    assert len(ShardSet.open(out)[0].meta.caption) <= 500 + len(", fine")
    entries[0]["captoin"] = "x"
    path.write_text(json.dumps({"data_root": "imgs", "data_list": entries}))
    before = contents(out)
    with pytest.raises(DataError, match=r"data_list\[0\]: unknown field 'captoin'; did you mean caption\?"):
        place.run(out, annotations=[path], prompts=[])
    assert contents(out) == before


def test_a_teacher_that_makes_nan_stops_the_run_at_once(place: Place, tmp_path: Path) -> None:
    config = write_teacher(tmp_path)
    file = CheckpointFile(tmp_path / "teacher.safetensors")
    tensors = {key: file.read(key) for key in file.shapes}
    tensors["model.diffusion_model.out.2.weight"][:] = float("nan")
    write_checkpoint(tmp_path / "teacher.safetensors", tensors)
    with pytest.raises(DataError, match=r"shard-000000\.tar, inputs 0 to 1: the teacher produced NaN or Inf"):
        precompute(load(config), tmp_path / "out", prompts=[place.prompts])
    assert not list((tmp_path / "out").glob("shard-*"))


def test_a_run_with_other_settings_is_refused_and_the_difference_named(
    place: Place, finished: Path, tmp_path: Path
) -> None:
    before = contents(finished)
    cases = {
        "precompute.guidance_scale=5.0": r"config\.precompute\.guidance_scale: received 5\.0, expected 3\.0",
        "precompute.seed=1": r"config\.precompute\.seed: received 1",
        "teacher.prompt_suffix=bad": r"config\.teacher\.prompt_suffix",
        "shards.samples_per_shard=4": r"samples_per_shard",
        f"inputs.font={ROOT / 'models/fonts/DejaVuSans-Bold.ttf'}": r"fonts\.default",
    }
    for override, message in cases.items():
        with pytest.raises(DataError, match=message):
            place.run(finished, override)
    other = write_teacher(tmp_path, seed="another")
    with pytest.raises(DataError, match="base_fingerprint: received .*teacher_fingerprint"):
        precompute(load(other), finished, annotations=[place.annotations], prompts=[place.prompts])
    assert contents(finished) == before
    assert place.run(finished, "precompute.max_failures=5", "precompute.render_workers=1").shards_found == 3


def test_rollouts_differ_in_their_noise_and_predictions_are_kept(place: Place, tmp_path: Path) -> None:
    overrides = ("precompute.num_rollouts=3", "precompute.store_predictions=true")
    place.run(tmp_path / "out", *overrides, annotations=[], limit=2)
    for record in ShardSet.open(
        tmp_path / "out",
    ):
        assert record.rollout_latents.shape == (3, 3, 4, 8, 8)
        assert len(set(record.meta.seeds)) == 3
        assert len({tuple(noise.flatten().tolist()) for noise in record.rollout_latents[:, 0]}) == 3
        assert record.x0_cond is not None and record.x0_cond.shape == (3, 2, 4, 8, 8)


def test_noised_records_hold_noised_data_latents(place: Place, tmp_path: Path) -> None:
    overrides = (
        'precompute.source="noised"',
        "precompute.num_rollouts=2",
        "precompute.solver_steps=20",
        "precompute.record_every=5",
        "precompute.store_predictions=true",
    )
    out = tmp_path / "out"
    done = place.run(out, *overrides, limit=5)
    assert (done.records, done.failed) == (4, 1)
    assert [failure.message for failure in read_failures(out)] == [
        'prompts.jsonl:1: precompute.source = "noised" needs an image'
    ]
    config = load(place.config, *overrides)
    teacher, settings = Teacher.load(config), RenderSettings.from_config(config)
    inputs = open_inputs([place.annotations], [], config.inputs, {})
    all_timesteps = set()
    for index, record in enumerate(ShardSet.open(out)):
        timesteps = record.rollout_timesteps
        all_timesteps |= set(timesteps.tolist())
        assert len(timesteps) == 4 and set(timesteps.tolist()) <= set(range(49, 1000, 50))
        image = render_input(inputs[index], settings).image
        assert image is not None
        with torch.no_grad():
            x0 = teacher.vae.encode(image[None])[0]
        end = record.rollout_latents[:, -1].float()  # (R, C, h, w)
        assert torch.allclose(end[0], x0, atol=2e-3) and torch.equal(end[0], end[1])
        alphas = make_alphas_cumprod()[timesteps].view(4, 1, 1, 1)
        noise = (record.rollout_latents[:, :-1].float() - alphas.sqrt() * end[:, None]) / (1 - alphas).sqrt()
        assert 0.9 < noise.std() < 1.1
        assert abs(np.corrcoef(noise.flatten(2).flatten(0, 1).numpy())[np.triu_indices(8, 1)]).max() < 0.35
        assert record.x0_cond is not None and not torch.equal(record.x0_cond, record.x0_uncond)
    assert len(all_timesteps) > 6


def test_a_recorder_gives_one_record_per_input_in_any_company(place: Place, finished: Path) -> None:
    config = load(place.config)
    settings = RenderSettings.from_config(config)
    shards = ShardSet.open(finished)
    inputs = open_inputs([place.annotations], [place.prompts], config.inputs, {})
    recorder = Recorder(Teacher.load(config), shards.uncond, config.precompute)
    (batch,) = recorder.record([[(5, render_input(inputs[5], settings))]], "the set")
    ((index, alone),) = batch().records  # recorded beside a shorter caption
    stored = shards[5]
    assert index == 5 and alone.meta == stored.meta
    assert list(recorder.record([[]], "the set")) == []
    error = (alone.rollout_latents.float() - stored.rollout_latents.float()).norm()
    assert error / stored.rollout_latents.float().norm() < 1e-3


def test_wrong_settings_are_one_line(place: Place, tmp_path: Path) -> None:
    cases: dict[str, tuple[type[Exception], str]] = {
        "inputs.size=72": (UsageError, "inputs.size: received 72, expected a multiple of 16"),
        "inputs.font=none.ttf": (DataError, "inputs.font: no file or folder 'none.ttf'"),
        f"inputs.font={place.config}": (DataError, "expected a TrueType"),
        "model.checkpoint=": (UsageError, "model.checkpoint is empty"),
        "model.checkpoint=none.ckpt": (DataError, "model.checkpoint: no file"),
        "model.network=sd15": (DataError, "teacher.safetensors"),
    }
    for override, (kind, message) in cases.items():
        with pytest.raises(kind, match=message) as caught:
            place.run(tmp_path / "out", override)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="task index: received 3, expected 0 to 2"):
        place.run(tmp_path / "out", task_index=3, num_tasks=3)
    with pytest.raises(DataError, match="no inputs in no files"):
        place.run(tmp_path / "out", annotations=[], prompts=[])
    with pytest.raises(DataError, match=r"no inputs in .*empty\.json"):
        place.run(tmp_path / "out", annotations=[write_annotations(tmp_path / "empty.json")], prompts=[])
