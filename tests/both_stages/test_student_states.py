"""`precompute --states-from`: a student's own states, each with where the teacher goes from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from both_stages.student_states import states_from
from common.anytext2.conditioning import ConditioningBatch
from common.config import Config
from common.ddim import CLEAN, Grid
from common.errors import DataError, UsageError
from pipeline import cli
from shards.reading.reader import ShardSet
from shards.records.record import Record
from stage1_teacher.teacher.solver import solve
from stage1_teacher.teacher.student_states import phase_grids
from stage1_teacher.teacher.teacher import Teacher
from stage2_student.student.adapter import CARD_FILE
from stage2_student.student.sample import LoadedStudent, read_start
from tests.fresh_student import write_fresh_student
from tests.stage1_teacher.small_teacher import load, write_prompts, write_teacher

INPUTS, ROLLOUTS = 3, 2
SETS = ("--set", f"precompute.num_rollouts={ROLLOUTS}", "--set", "precompute.solver_steps=8")
"""Of 8 solver steps every second state is kept, so that a phase of two has a rounded state within it."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student of two steps, and sets of the same inputs: the teacher's solves, and the student's."""
    folder = tmp_path_factory.mktemp("states")
    torch.set_num_threads(1)
    path = write_teacher(folder)
    write_prompts(folder / "prompts.jsonl", INPUTS)
    write_fresh_student(folder / "student", load(path, "lora.rank=2"), spread=0.2)
    write_fresh_student(folder / "one", load(path, "lora.rank=2"), steps=1)
    change_card(folder / "student", folder / "lcm", sampler="lcm")
    change_card(folder / "student", folder / "upstream", grid="upstream")
    assert precompute(folder, "solves").exit_code == 0
    result = precompute(folder, "states", "--states-from", folder / "student")
    assert result.exit_code == 0, result.output
    return folder


def change_card(source: Path, target: Path, **changes: object) -> None:
    """Copy a student, its card saying otherwise."""
    shutil.copytree(source, target)
    card = json.loads((target / CARD_FILE).read_text())
    (target / CARD_FILE).write_text(json.dumps(card | changes))


def precompute(folder: Path, out: str, *more: object) -> Result:
    given = ("--config", folder / "config.toml", "--prompts", folder / "prompts.jsonl", "--out", folder / out)
    return run("precompute", *given, *SETS, *more)


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return load(folder / "config.toml")


@pytest.fixture(scope="module")
def records(folder: Path) -> list[Record]:
    return list(ShardSet.open(folder / "states"))


def test_records_say_what_they_are(records: list[Record]) -> None:
    assert [record.meta.source for record in records] == ["student"] * INPUTS
    for record in records:
        assert record.rollout_timesteps.tolist() == [999, 499, 499]
        assert record.rollout_latents.shape[:2] == (ROLLOUTS, 4)


def test_the_first_phase_is_the_teachers_own(folder: Path, records: list[Record]) -> None:
    for record, solve_ in zip(records, ShardSet.open(folder / "solves"), strict=True):
        assert record.meta.input_id == solve_.meta.input_id and record.meta.seeds == solve_.meta.seeds
        assert torch.equal(record.rollout_latents[:, 0], solve_.rollout_latents[:, 0])
        # Batches are put together alike, so that what is solved from the same noise is the same to the bit.
        assert solve_.rollout_timesteps.tolist() == [999, 749, 499, 249]
        assert torch.equal(record.rollout_latents[:, 1], solve_.rollout_latents[:, 2])


def test_the_second_phase_starts_where_the_student_came(
    folder: Path, config: Config, records: list[Record]
) -> None:
    student = LoadedStudent.load(config, folder / "student")
    for record in records:
        states: dict[int, Tensor] = {}
        conditioning = ConditioningBatch.stack([record.conditioning] * ROLLOUTS)
        student.latents(conditioning, record.rollout_latents[:, :1].float(), states.__setitem__)
        assert torch.allclose(record.rollout_latents[:, 2].float(), states[499].half().float(), atol=1e-2)
        # The student is another than the teacher, or the test would say nothing.
        assert float((record.rollout_latents[:, 2] - record.rollout_latents[:, 1]).abs().max()) > 0.05


def test_the_teacher_ends_the_second_phase_from_there(folder: Path, config: Config, records: list[Record]) -> None:
    teacher, uncond = Teacher.load(config), ShardSet.open(folder / "states").uncond
    for record in records:
        again = solve(
            teacher,
            [record.conditioning] * ROLLOUTS,
            uncond,
            record.rollout_latents[:, 2].float(),
            Grid(timesteps=torch.tensor([499, 374, 249, 124]), end=torch.tensor(CLEAN)),
            guidance_scale=3.0,
            keep={0, 2},
        )
        assert torch.allclose(record.rollout_latents[:, 3].float(), again.states[:, -1].float(), atol=1e-2)


def test_the_set_is_sound_and_can_be_looked_at(folder: Path) -> None:
    shards = ("--shards", folder / "states")
    assert run("finalize", *shards).exit_code == 0
    assert "phases_2" in (folder / "states" / "summary.json").read_text()
    verified = run("verify", "--config", folder / "config.toml", *shards, "--recompute", INPUTS)
    assert verified.exit_code == 0, verified.output
    sheet = folder / "sheet.png"
    inspected = run("inspect", "--config", folder / "config.toml", *shards, "--out", sheet)
    assert inspected.exit_code == 0 and sheet.exists(), inspected.output
    assert "student.adapter" in inspected.output and '"student"' in inspected.output


def test_phased_trains_on_it(folder: Path) -> None:
    out = folder / "run"
    command = ("train", "--config", folder / "config.toml", "--shards", folder / "states", "--out", out)
    sets = ("train.num_phases=2", "train.max_steps=2", "train.batch_size=2", "lora.rank=2", "train.loss=l2")
    result = run(*command, *(word for value in sets for word in ("--set", value)))
    assert result.exit_code == 0, result.output
    assert LoadedStudent.load(load(folder / "config.toml"), out).card.timesteps == (999, 499)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("train.num_phases=4",), "expected 2"),
        (("train.num_phases=2", "train.objective=unrolled"), "expected phased"),
        (("train.num_phases=2", "train.grid=upstream"), "expected trailing"),
        (("train.num_phases=2", "train.states=all"), 'expected "starts"'),
    ],
)
def test_training_that_needs_the_teachers_own_states_is_refused(
    folder: Path, tmp_path: Path, changes: tuple[str, ...], said: str
) -> None:
    command = (
        "train",
        "--config",
        folder / "config.toml",
        "--shards",
        folder / "states",
        "--out",
        tmp_path / "run",
    )
    result = run(*command, *(word for value in changes for word in ("--set", value)))
    assert result.exit_code == 2 and said in result.output, result.output


def test_it_goes_on_with_the_same_student_alone(folder: Path, tmp_path: Path) -> None:
    for name in ("teacher.safetensors", "network.toml", "config.toml", "prompts.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    shutil.copytree(folder / "states", tmp_path / "states")
    (tmp_path / "states" / "shard-000000.json").unlink()
    assert precompute(tmp_path, "states", "--states-from", folder / "student").exit_code == 0
    stored = "shard-000000.tar"
    assert (tmp_path / "states" / stored).read_bytes() == (folder / "states" / stored).read_bytes()
    write_fresh_student(tmp_path / "other", load(folder / "config.toml", "lora.rank=2"), spread=0.1)
    other = precompute(tmp_path, "states", "--states-from", tmp_path / "other")
    assert other.exit_code == 3 and "student.adapter" in other.output, other.output
    none = precompute(tmp_path, "states")
    assert none.exit_code == 3, none.output


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--set", "precompute.source=student"), "--states-from ADAPTER"),
        (("--states-from", "student", "--set", "precompute.source=noised"), "expected it to be left out"),
        (("--states-from", "student", "--set", "precompute.solver_steps=2"), "a multiple of 2, 4 or more"),
        (("--states-from", "one", "--set", "precompute.solver_steps=8"), "expected two or more"),
        (("--states-from", "lcm"), 'sampler "lcm"'),
        (("--states-from", "upstream"), 'grid "upstream"'),
        (("--states-from", "student", "--set", "precompute.store_predictions=true"), "expected false"),
        (("--states-from", "student", "--trajectories", "whole"), "leave --states-from away"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(folder)
    result = precompute(folder, "refused", *more)
    assert result.exit_code == 2 and said in result.output, result.output
    assert not (folder / "refused").exists()


def test_an_image_of_a_record_starts_from_its_noise(folder: Path, records: list[Record], config: Config) -> None:
    start = read_start(config, str(folder / "states"), 1, None, ROLLOUTS)
    assert start.noise is not None and torch.equal(start.noise, records[1].rollout_latents[:, 0].float())
    assert start.x0 is None  # the teacher's last phase started elsewhere
    drawn = (
        "sample",
        "--config",
        folder / "config.toml",
        "--adapter",
        folder / "student",
        "--out",
        folder / "x.png",
    )
    result = run(*drawn, "--shards", folder / "states", "--record", 1, "--compare")
    assert result.exit_code == 2 and "give a record of source" in result.output, result.output


def test_a_student_that_diverges_is_named_and_not_the_teacher(folder: Path, tmp_path: Path) -> None:
    write_fresh_student(tmp_path / "wild", load(folder / "config.toml", "lora.rank=2"), spread=1e4)
    result = precompute(folder, "wild-states", "--states-from", tmp_path / "wild")
    assert result.exit_code == 3 and "the student of --states-from came to NaN or Inf" in result.output


def test_an_adapter_that_changes_before_it_is_read_is_refused(
    folder: Path, tmp_path: Path, config: Config
) -> None:
    shutil.copytree(folder / "student", tmp_path / "student")
    _, student = states_from(config, tmp_path / "student")
    write_fresh_student(tmp_path / "student", load(folder / "config.toml", "lora.rank=2"), spread=0.1)
    with pytest.raises(DataError, match="is another than when this command started"):
        student.load()


def test_a_job_that_trains_on_it_starts_from_the_same_student(folder: Path) -> None:
    inputs = (
        "--config",
        folder / "config.toml",
        "--prompts",
        folder / "prompts.jsonl",
        "--out",
        folder / "states",
    )
    command = ("submit", "precompute", "--num-tasks", 2, *inputs, "--train", folder / "next", "--dry-run")
    given = run(*command, "--states-from", folder / "student")
    assert given.exit_code == 0 and f"--from {folder / 'student'}" in given.output, given.output
    assert "--from" not in run(*command).output


def test_no_adapter_is_said(folder: Path, tmp_path: Path) -> None:
    result = precompute(folder, "none", "--states-from", tmp_path)
    assert result.exit_code == 3 and "no adapter there" in result.output


def test_phases_of_uneven_length_are_cut_where_the_student_is_called() -> None:
    phases = phase_grids([999, 499, 249], 8, record_every=2)
    assert [phase.grid.timesteps.tolist() for phase in phases] == [[999, 874, 749, 624], [499, 374], [249, 124]]
    assert [int(phase.grid.end) for phase in phases] == [499, 249, CLEAN]
    assert [sorted(phase.rounded) for phase in phases] == [[0, 2], [0], [0]]
    assert [sorted(phase.rounded) for phase in phase_grids([999, 624], 8, record_every=2)] == [[0, 2], [0, 1, 3]]
    for off in ([999, 500], [874, 499], [999, 124]):
        with pytest.raises(UsageError, match="expected starts of phases"):
            phase_grids(off, 8, record_every=2)
