"""Solves of other sizes than batches of inputs, and work done beside them: records, and what a fault leaves."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import DataError, MachineError, Stopped
from shards.looking.finalize import finalize
from shards.reading.reader import ShardSet
from shards.records.record import Record
from shards.writing.writer import ShardWriter
from stage1_teacher.precompute import Done, precompute
from stage1_teacher.recording import making, recorder
from stage1_teacher.recording.identity import build_identity
from stage1_teacher.recording.recorder import Recorder
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.teacher import Teacher
from tests.stage1_teacher.small_teacher import annotation, load, write_annotations, write_prompts, write_teacher

SETTINGS = ("shards.samples_per_shard=7", "precompute.solver_steps=2", "precompute.record_every=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small teacher, 9 prompts, and 8 annotations of which the 1st, 4th, 5th and 8th cannot be rendered."""
    folder = tmp_path_factory.mktemp("small")
    write_teacher(folder)
    write_prompts(folder / "prompts.jsonl", 9)
    bad = [{"polygon": [[0, 0], [1, 1]], "text": "x", "language": "Latin"}]
    entries = [annotation(n, **({"annotations": bad} if n in (0, 3, 4, 7) else {})) for n in range(8)]
    write_annotations(folder / "data.json", *entries)
    return folder


def run(folder: Path, out: Path, *overrides: str, **options: Any) -> Done:
    options = {"prompts": [folder / "prompts.jsonl"]} | options
    return precompute(load(folder / "config.toml", *SETTINGS, *overrides), out, **options)


def files(out: Path) -> dict[str, bytes]:
    """Return shards, sidecars and failures."""
    found = [path for path in out.rglob("*") if path.is_file() and ".work" not in path.parts]
    return {
        str(path.relative_to(out)): path.read_bytes() for path in found if path.suffix in (".tar", ".jsonl")
    } | {path.name: path.read_bytes() for path in found if path.name.startswith("shard-")}


@pytest.fixture(autouse=True)
def one_teacher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load it once: no call changes it."""
    monkeypatch.setattr(Teacher, "load", lambda _config: load_teacher(folder))


@cache
def load_teacher(folder: Path, load_it: Callable[[Any], Teacher] = Teacher.load) -> Teacher:
    return load_it(load(folder / "config.toml"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The prompts' set, made by one thread without interruption."""
    run(folder, folder / "whole")
    return folder / "whole"


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode and write beside the solves, as on a GPU."""
    monkeypatch.setattr(making, "Recorder", partial(Recorder, overlaps=True))


CASES = {
    "plain": (),
    "noised": ('precompute.source="noised"', "precompute.solver_steps=4", "precompute.store_predictions=true"),
    "larger solves of rollouts": ("precompute.solve_size=7", "precompute.num_rollouts=3"),
}


@pytest.mark.parametrize("case", CASES)
def test_work_beside_the_solves_changes_no_byte(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    given = {"annotations": [folder / "data.json"]}
    if case == "noised":
        given["prompts"] = []
    done = run(folder, tmp_path / "alone", *CASES[case], **given)
    assert done.failed == 4 and done.records == (4 if case == "noised" else 13)
    threads = set()

    def noting(what: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            threads.add(threading.current_thread().name.partition("_")[0])
            return what(*arguments)

        return noted

    monkeypatch.setattr(making, "Recorder", partial(Recorder, overlaps=True))
    monkeypatch.setattr(Recorder, "encode", noting(Recorder.encode))
    monkeypatch.setattr(ShardWriter, "add", noting(ShardWriter.add))
    assert run(folder, tmp_path / "beside", *CASES[case], **given) == done
    assert threads == {"encode", "write"}
    assert files(tmp_path / "beside") == files(tmp_path / "alone")
    assert finalize(tmp_path / "beside").failed == 4


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    rows: list[int] = []
    solve: Callable[..., Any] = recorder.solve

    def counted(teacher: Any, conditionings: Any, *arguments: Any, **options: Any) -> Any:
        rows.append(len(conditionings))
        return solve(teacher, conditionings, *arguments, **options)

    monkeypatch.setattr(recorder, "solve", counted)
    return rows


def test_solves_cross_batches_of_inputs_but_no_shard(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = count_rows(monkeypatch)
    run(folder, tmp_path / "large", "precompute.solve_size=5")
    assert rows == [5, 2, 2]  # of 7 and 2 inputs
    small, large = ShardSet.open(whole), ShardSet.open(tmp_path / "large")
    assert [record.meta for record in large] == [record.meta for record in small]
    for one, other in zip(small, large, strict=True):
        difference = (one.rollout_latents.float() - other.rollout_latents.float()).norm()
        assert difference < 2e-3 * one.rollout_latents.float().norm()
        assert torch.equal(one.image_context, other.image_context)  # encoded in the same company
    rows.clear()
    run(folder, tmp_path / "rollouts", "precompute.solve_size=5", "precompute.num_rollouts=2", limit=7)
    assert rows == [5, 5, 4]
    first = ShardSet.open(tmp_path / "rollouts")[0]
    assert torch.equal(first.rollout_latents[0, 0], small[0].rollout_latents[0, 0])


def test_the_last_batch_of_a_shard_can_be_filled_up_and_its_records_stay(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = count_rows(monkeypatch)
    monkeypatch.setattr(making, "Recorder", lambda *a, **options: Recorder(*a, **options | {"compiled": True}))
    run(folder, tmp_path / "full", "precompute.num_rollouts=3", limit=7)
    assert rows == [2] * 11  # 21 solves
    run(folder, tmp_path / "noised", 'precompute.source="noised"', annotations=[folder / "data.json"], prompts=[])
    filled = ShardSet.open(tmp_path / "full")
    for one, other in zip(ShardSet.open(whole), filled, strict=False):
        assert other.rollout_latents.shape[0] == 3
        difference = (one.rollout_latents[0].float() - other.rollout_latents[0].float()).norm()
        assert difference < 2e-3 * one.rollout_latents.float().norm()
    assert [len(record.rollout_latents) for record in ShardSet.open(tmp_path / "noised")] == [1] * 4


def test_nothing_is_encoded_while_a_network_meets_a_new_shape(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled is traced, and a network that another thread runs meanwhile would be traced with it."""
    encoding, beside = [0], list[int]()
    encode, solve = Teacher.encode, recorder.solve

    def slow(self: Teacher, inputs: Any) -> Any:
        encoding[0] += 1
        time.sleep(0.02)
        result = encode(self, inputs)
        encoding[0] -= 1
        return result

    def watched(*arguments: Any, **options: Any) -> Any:
        seen = 0
        for _ in range(60):
            seen = seen or encoding[0]
            time.sleep(0 if seen else 0.005)
        beside.append(seen)
        return solve(*arguments, **options)

    monkeypatch.setattr(Teacher, "encode", slow)
    monkeypatch.setattr(recorder, "solve", watched)
    for compiled in (False, True):
        options = {"overlaps": True, "compiled": compiled}
        monkeypatch.setattr(making, "Recorder", lambda *a, **given: Recorder(*a, **given | options))  # noqa: B023
        run(folder, tmp_path / str(compiled), "shards.samples_per_shard=9")
    assert beside[0] == 1  # usually encoded beside the first solve
    assert beside[5:] == [0, *beside[6:]] and 1 in beside[6:]  # not so where shapes are new, later again


def test_what_is_done_for_speed_is_in_provenance_and_not_in_identity(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = []
    monkeypatch.setattr(making, "prepare_networks", lambda model, *networks: prepared.append((model, networks)))
    rows = count_rows(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "load", classmethod(lambda _cls, config: copy.deepcopy(load_teacher(folder))))
        run(folder, tmp_path / "fast", "model.compile=true", "model.channels_last=true")
    assert rows == [2] * 5  # of 7 and 2 inputs: filled up
    ((model, networks),) = prepared
    assert model.compile and model.channels_last
    assert [type(network).__name__ for network in networks] == ["UNet", "WriteNet"]
    usual, fast = (ShardSet.open(out).headers[0].provenance for out in (whole, tmp_path / "fast"))
    assert fast == usual | {"compile": True, "channels_last": True}
    assert ShardSet.open(tmp_path / "fast").manifest.identity == ShardSet.open(whole).manifest.identity


def test_the_size_of_solves_is_identity_only_where_it_is_another(folder: Path, tmp_path: Path) -> None:
    def solves(*overrides: str) -> Any:
        config = load(folder / "config.toml", *overrides)
        identity = build_identity(config, RenderSettings.from_config(config))
        return json.dumps(identity), identity["config"]["precompute"].get("solve_size")

    usual = solves()
    assert usual[1] is None
    assert solves("precompute.solve_size=2") == usual  # the batch of inputs is 2
    assert solves("precompute.solve_size=4")[1] == 4
    run(folder, tmp_path / "out", limit=1)
    with pytest.raises(DataError, match=r"config\.precompute\.solve_size: received 4"):
        run(folder, tmp_path / "out", "precompute.solve_size=4", limit=1)


def test_nan_names_the_inputs_that_were_solved_together(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlapping: None
) -> None:
    rows = count_rows(monkeypatch)
    noise = Recorder._draw_noise

    def spoil(self: Recorder, item: Any, count: int = 1) -> torch.Tensor:
        return noise(self, item, count) * (float("nan") if item.encoded.index == 3 else 1)

    monkeypatch.setattr(Recorder, "_draw_noise", spoil)
    with pytest.raises(DataError, match=r"^shard-000000\.tar, inputs 3 to 5: the teacher produced NaN or Inf"):
        run(folder, tmp_path / "out", "precompute.solve_size=3")
    assert rows == [3, 3] and not list((tmp_path / "out").glob("shard-*"))


def test_a_disk_that_fails_behind_a_solve_ends_the_run_and_nothing_more_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlapping: None
) -> None:
    tried: list[int] = []
    add = ShardWriter.add

    def fail(self: ShardWriter, index: int, record: Record) -> None:
        tried.append(index)
        if index == 3:
            raise MachineError("no space left")
        add(self, index, record)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", fail)
        with pytest.raises(MachineError, match="no space left"):
            run(folder, tmp_path / "out", limit=7)
    assert tried == [0, 1, 2, 3]  # of 7
    assert not list((tmp_path / "out").glob("shard-*"))


def test_a_signal_between_solves_drops_the_shard_in_work_and_a_further_run_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlapping: None, whole: Path
) -> None:
    solved: list[int] = []
    solve = Recorder._solve

    def stop(self: Recorder, batch: Any) -> Any:
        solved.append(len(batch))
        if len(solved) == 5:  # four batches of the first shard's 7 inputs
            os.kill(os.getpid(), signal.SIGTERM)
        return solve(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "_solve", stop)
        with pytest.raises(Stopped, match="1 of this task's 2 shards are committed"):
            run(folder, tmp_path / "out")
    assert len(solved) == 5  # at the batch's border, not later
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert run(folder, tmp_path / "out").shards_written == 1
    assert files(tmp_path / "out") == files(whole)
