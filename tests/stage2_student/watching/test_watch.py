from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import stage2_student.watch as watch_module
from common.anytext2.conditioning import ConditioningBatch
from common.errors import DataError, UsageError
from shards.reading.reader import ShardSet
from stage2_student.evaluation.endpoint import endpoint_error
from stage2_student.student.adapter import find_adapter, load_tensors, read_card
from stage2_student.student.export import export
from stage2_student.student.sample import LoadedStudent
from stage2_student.train import train
from stage2_student.watching.checkpoints import Candidate, find_candidates
from stage2_student.watching.log import best_of, read_measured
from stage2_student.watching.measuring import Measuring
from tests.stage2_student.test_processes import RUN_AND_LIST_MODULES, start, wait_for
from tests.stage2_student.watching.conftest import RECORDS, STEPS, Place

SIDE, GAP = 160, 6
"""Of a picture of 32 pixels in a grid, enlarged by a whole factor; pixels."""


def steps_in(run: Path) -> list[int]:
    return [one.step for one in read_measured(run / "watch")]


def in_a_process(work: Callable[[], object]) -> multiprocessing.Process:
    """Do something in a copy of this process, which may be killed."""
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


def test_every_checkpoint_is_measured_as_one_measures_by_hand(place: Place, watched: Path) -> None:
    measured = read_measured(watched / "watch")
    assert tuple(one.step for one in measured) == STEPS
    records = [ShardSet.open(place.held_out)[index] for index in range(RECORDS)]
    noise = torch.stack([record.rollout_latents[0, :1] for record in records]).float()
    solved = torch.stack([record.rollout_latents[0, -1] for record in records])
    for one in measured:
        student = LoadedStudent.load(place.config, watched / f"checkpoints/step-{one.step:08d}")
        latents = student.latents(ConditioningBatch.stack([record.conditioning for record in records]), noise)
        assert one.endpoint_error.value == pytest.approx(endpoint_error(latents, solved), rel=1e-4)
        assert one.endpoint_error.low <= one.endpoint_error.value <= one.endpoint_error.high
        assert one.endpoint_error.count == RECORDS and one.solver_steps == 2
        assert one.sen_acc is not None and one.sen_acc.count == RECORDS and one.psnr is not None
    assert len({one.endpoint_error.value for one in measured}) == len(STEPS)


def test_the_best_is_what_has_the_lowest_error_and_all_commands_take_it(
    place: Place, watched: Path, tmp_path: Path
) -> None:
    best = best_of(read_measured(watched / "watch"))
    assert best is not None
    adapter = find_adapter(watched / "best")
    assert read_card(adapter).step == best.step
    expected = load_tensors(watched / f"checkpoints/step-{best.step:08d}/lora")
    found = load_tensors(watched / "best")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert LoadedStudent.load(place.config, watched / "best").card.num_steps == 2
    export(place.config, watched / "best", "diffusers", tmp_path / "student.safetensors")
    moved = Path(shutil.copytree(watched, tmp_path / "elsewhere", symlinks=True))
    assert read_card(find_adapter(moved / "best")).step == best.step


def test_the_strip_has_a_row_for_each_record_and_a_column_for_each_step_and_the_teacher(watched: Path) -> None:
    strip = np.asarray(Image.open(watched / "watch/strip.png"))
    columns, left = 1 + len(STEPS), [GAP + column * (SIDE + GAP) for column in range(1 + len(STEPS))]
    assert strip.shape == (20 + GAP + RECORDS * (SIDE + GAP), GAP + columns * (SIDE + GAP), 3)
    tiles = [strip[20 + GAP : 20 + GAP + SIDE, start : start + SIDE] for start in left]
    assert all(tile.std() > 5 for tile in tiles)  # pictures, and each its own
    assert len({tile.tobytes() for tile in tiles}) == len(tiles)


def test_the_page_is_one_file_that_ends_to_reload_itself_when_training_is_done(watched: Path) -> None:
    page = (watched / "watch/index.html").read_text()
    assert page.count("<img") == RECORDS * (1 + len(STEPS)) and 'src="data:' in page
    assert "http-equiv" not in page and "Training is done." in page
    assert all(f"step {step}" in page for step in STEPS)


def test_a_second_watcher_goes_on_where_the_first_ended(place: Place, watched: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run", symlinks=True))
    before = (run / "watch/log.jsonl").read_bytes()
    again = place.watch(run)
    assert again.new == 0 and (run / "watch/log.jsonl").read_bytes() == before
    place.train(run, 8)
    more = place.watch(run)
    assert more.new == 1 and steps_in(run) == [*STEPS, 8]
    assert (run / "watch/log.jsonl").read_bytes().startswith(before)


def test_a_watcher_that_begins_before_training_ends_by_itself_with_it(place: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = in_a_process(lambda: place.watch(run, once=False))
    page, deadline = run / "watch/index.html", time.monotonic() + 100
    while not page.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert 'http-equiv="refresh"' in page.read_text() and "0 checkpoints" in page.read_text()
    for name in ("checkpoints", "config.json", "log.jsonl", "shards.json"):  # as training on another machine does
        source, target = place.run / name, tmp_path / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        target.rename(run / name)
    process.join(120)
    assert process.exitcode == 0
    assert tuple(steps_in(run)) == STEPS


def test_killed_between_a_line_and_the_page_the_next_watcher_makes_up_for_it(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place.copy(tmp_path / "run")
    append = watch_module.append_measured

    def append_and_die(*arguments: object) -> None:
        append(*arguments)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(watch_module, "append_measured", append_and_die)
        process = in_a_process(lambda: place.watch(run))
        process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert steps_in(run) == [2] and "step 2" not in (run / "watch/index.html").read_text()
    line = (run / "watch/log.jsonl").read_bytes()
    with (run / "watch/log.jsonl").open("ab") as log:
        log.write(line[: len(line) // 2])  # and another line was torn
    done = place.watch(run)
    assert tuple(steps_in(run)) == STEPS and done.new == 2
    assert (run / "watch/log.jsonl").read_bytes().startswith(line + b"{") and "step 2" in done.page.read_text()


def test_a_checkpoint_that_vanishes_while_it_is_read_is_left_out_and_named(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = place.copy(tmp_path / "run")
    measure = Measuring.measure

    def pruned_meanwhile(self: Measuring, candidate: Candidate, *rest: object) -> object:
        if candidate.step == 4:
            shutil.rmtree(candidate.checkpoint)
        return measure(self, candidate, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Measuring, "measure", pruned_meanwhile)
    with caplog.at_level(logging.WARNING):
        place.watch(run)
    assert steps_in(run) == [2, 6]
    assert "step 4: vanished while it was read" in caplog.text


def test_a_damaged_adapter_is_left_out_and_named(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = place.copy(tmp_path / "run")
    (weights,) = (run / "checkpoints/step-00000004/lora").rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with caplog.at_level(logging.WARNING):
        place.watch(run)
    assert steps_in(run) == [2, 6] and "step 4: damaged and left out" in caplog.text
    assert (run / "watch/index.html").exists()


def test_a_step_that_was_trained_again_is_measured_again(place: Place, watched: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run", symlinks=True))
    before = {one.step: one for one in read_measured(run / "watch")}
    other = place.config.replace(train=place.config.train.replace(seed=9, max_steps=2))
    train(other, shards=place.shards, run=tmp_path / "other")
    shutil.rmtree(run / "checkpoints/step-00000002")
    shutil.copytree(tmp_path / "other/checkpoints/step-00000002", run / "checkpoints/step-00000002")
    assert place.watch(run).new == 1
    after = {one.step: one for one in read_measured(run / "watch")}
    assert tuple(after) == STEPS
    assert after[2].adapter != before[2].adapter and after[4] == before[4]


def test_other_records_than_before_are_refused_and_named(place: Place, watched: Path) -> None:
    with pytest.raises(DataError, match=r"count: received 2, expected 3.*move watch/ away"):
        place.watch(watched, records=2)


def test_a_run_that_is_not_there_is_refused_only_if_nobody_would_wait_for_it(place: Place, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run"):
        place.watch(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_judge_or_a_vae_it_says_what_to_do(place: Place, tmp_path: Path) -> None:
    run = place.copy(tmp_path / "run")
    config = place.config
    no_judge = config.replace(evaluate=config.evaluate.replace(judge="my_ocr:make"))
    with pytest.raises(UsageError, match=r"evaluate\.judge 'my_ocr:make'"):
        watch_module.watch(no_judge, run, held_out=str(place.held_out), once=True)
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Tensor] = load_file(config.model.checkpoint)
    lacking = {key: tensor for key, tensor in tensors.items() if not key.startswith("first_stage_model")}
    save_file(lacking, str(tmp_path / "base.safetensors"))
    no_vae = config.replace(model=config.model.replace(checkpoint=str(tmp_path / "base.safetensors")))
    with pytest.raises(DataError, match="first_stage_model"):
        watch_module.watch(no_vae, run, held_out=str(place.held_out), once=True)
    assert not (run / "watch/log.jsonl").exists() and not (run / "watch/watcher.json").exists()


def test_a_signal_ends_a_waiting_watcher_with_75_and_it_has_loaded_no_teacher(
    place: Place, watched: Path, tmp_path: Path
) -> None:
    run, modules = Path(shutil.copytree(watched, tmp_path / "run", symlinks=True)), tmp_path / "modules.json"
    content = json.loads((run / "config.json").read_bytes())
    content["train"]["max_steps"] = 1000
    (run / "config.json").write_text(json.dumps(content))
    (run / "watch/index.html").unlink()
    arguments = ["watch", str(run), "--config", str(place.toml), "--held-out", str(place.held_out)]
    code = RUN_AND_LIST_MODULES.format(modules=str(modules))
    process = start([sys.executable, "-c", code, "pipeline.py", *arguments, "--records", str(RECORDS)])
    wait_for(lambda: (run / "watch/index.html").exists(), process, 250)
    with pytest.raises(UsageError, match=f"process {process.pid} on .* watches it already"):
        place.watch(run)
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 75, errors
    assert "waits for what follows step 6 of 1000" in errors and "3 checkpoints are measured" in errors
    loaded = json.loads(modules.read_text())
    assert "stage2_student.watch" in loaded
    assert [
        name for name in loaded if name.startswith(("stage1_teacher", "both_stages", "transformers.models.clip"))
    ] == []


def test_figures_go_to_a_tracker_run_of_its_own(watched: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched / "watch/tensorboard"))
    events.Reload()
    for name in ("endpoint_error", "sen_acc", "psnr"):
        assert [event.step for event in events.Scalars(name)] == list(STEPS)
    assert "loss" not in events.Tags()["scalars"]


def test_candidates_are_told_by_their_lists_alone(place: Place) -> None:
    found = find_candidates(place.run)
    assert tuple(one.step for one in found) == STEPS
    assert len({one.identity for one in found}) == len(STEPS)
    assert all(one.damage() == "" for one in found)
