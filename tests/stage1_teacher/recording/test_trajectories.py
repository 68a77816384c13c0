from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.ddim import Grid
from common.errors import DataError, UsageError
from shards.reading.reader import ShardSet
from shards.trajectories import TrajectoryStore
from stage1_teacher.precompute import Done, precompute
from stage1_teacher.recording.trajectories import RolloutKeeper
from stage1_teacher.teacher.solver import solve
from stage1_teacher.teacher.teacher import Teacher
from tests.stage1_teacher.small_teacher import load, write_prompts, write_teacher

GRID = [999, 749, 499, 249]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small teacher and five prompts, of which the second fails: two shards, the last one short."""
    folder = tmp_path_factory.mktemp("small")
    write_teacher(folder)
    lines = write_prompts(folder / "prompts.jsonl", 5).read_text().splitlines()
    lines[1] = json.dumps({"caption": "x", "lines": [{"text": "", "box": [1, 1, 9, 9]}]})
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def run(folder: Path, out: Path, *overrides: str, **options: object) -> Done:
    config = load(folder / "config.toml", *overrides)
    return precompute(config, out, prompts=[folder / "prompts.jsonl"], **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def kept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ with two rollouts an input, and their trajectories in t/."""
    place = tmp_path_factory.mktemp("kept")
    run(folder, place / "shards", "precompute.num_rollouts=2", trajectories=place / "t")
    return place


def files(folder: Path) -> dict[str, bytes]:
    """Return a set's shards, sidecars and failures."""
    return {path.name: path.read_bytes() for path in folder.rglob("shard-*") if path.is_file()}


def test_shards_are_the_same_bytes_with_and_without_trajectories(folder: Path, kept: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "plain", "precompute.num_rollouts=2")
    assert files(tmp_path / "plain") == files(kept / "shards")
    assert len(files(kept / "shards")) == 5  # two shards, their sidecars, one list of failures


def test_any_step_of_any_rollout_can_be_read(kept: Path) -> None:
    store, shards = TrajectoryStore(kept / "t"), ShardSet.open(kept / "shards")
    assert store.missing() == [] and store.timesteps == tuple(GRID) and len(store.input_ids) == 2 * 5
    for number in range(len(shards)):
        record, place = shards[number], int(shards.key(number))  # a failed input keeps its place
        for rollout in range(2):
            sample = 2 * place + rollout
            assert store.input_ids[sample] == record.meta.input_id
            states = torch.stack([store.read(sample, step) for step in range(len(GRID) + 1)])
            assert states.dtype == torch.float16
            assert torch.equal(states[::2], record.rollout_latents[rollout])  # every second one is recorded
            assert not torch.equal(states[1], states[0]) and not torch.equal(states[3], states[4])
    for sample in (2, 3):
        with pytest.raises(DataError, match=rf"sample {sample} .* this input failed"):
            store.read(sample, 0)


def test_states_between_the_recorded_ones_are_those_the_teacher_went_through(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out", "precompute.batch_size=1", trajectories=tmp_path / "t", limit=1)
    teacher, shards = Teacher.load(load(folder / "config.toml")), ShardSet.open(tmp_path / "out")
    record = shards[0]
    unrounded = solve(
        teacher,
        [record.conditioning],
        shards.uncond,
        record.rollout_latents[0, :1],
        Grid(timesteps=torch.tensor(GRID[:2]), end=torch.tensor(GRID[2])),
        guidance_scale=3.0,
        keep=(0, 1),
        round_states=False,
    )
    assert torch.equal(TrajectoryStore(tmp_path / "t").read(0, 1), unrounded.states[0, 1].half())
    end = unrounded.states[0, 2].half()  # state 1 was not rounded on the way to it
    assert torch.equal(end, record.rollout_latents[0, 1])


def test_a_run_that_died_between_shard_and_trajectories_makes_these_again(
    folder: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, place = tmp_path / "out", tmp_path / "t"

    def die(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RolloutKeeper, "write", die)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out, "precompute.num_rollouts=2", trajectories=place)
    assert (out / "shard-000000.json").exists() and TrajectoryStore(place).missing() == [0, 1]
    before = (out / "shard-000000.tar").stat()
    done = run(folder, out, "precompute.num_rollouts=2", trajectories=place)
    assert (done.shards_found, done.shards_written, done.failed) == (0, 2, 1)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == before.st_mtime_ns  # the committed shard stayed
    (place / "done" / "000001.json").unlink()
    done = run(folder, out, "precompute.num_rollouts=2", trajectories=place)
    assert (done.shards_found, done.shards_written, done.failed) == (1, 1, 1)
    assert files(out) == files(kept / "shards")
    for path in (kept / "t").rglob("*"):
        if path.is_file() and path.name != "about.json":
            assert (place / path.relative_to(kept / "t")).read_bytes() == path.read_bytes(), path
    assert run(folder, out, "precompute.num_rollouts=2", trajectories=place).shards_written == 0


def test_a_task_writes_its_own_blocks_and_then_the_missing_ones_of_one_store(
    folder: Path, kept: Path, tmp_path: Path
) -> None:
    for index, written in ((1, 2), (0, 0)):
        result = run(
            folder,
            tmp_path / "out",
            "precompute.num_rollouts=2",
            trajectories=tmp_path / "t",
            task_index=index,
            num_tasks=2,
        )
        assert result.shards_written == written
        assert TrajectoryStore(tmp_path / "t").missing() == []
    ours, theirs = TrajectoryStore(tmp_path / "t"), TrajectoryStore(kept / "t")
    assert all(torch.equal(ours.read_rollout(s), theirs.read_rollout(s)) for s in (0, 1, *range(4, 10)))


def test_what_has_no_whole_rollouts_is_refused(folder: Path, kept: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='precompute.source is "noised"'):
        run(folder, tmp_path / "out", 'precompute.source="noised"', trajectories=tmp_path / "t")
    assert not (tmp_path / "out").exists() and not (tmp_path / "t").exists()
    with pytest.raises(DataError, match=r"made with other settings \(.*guidance_scale"):
        run(folder, tmp_path / "out", "precompute.guidance_scale=2.0", trajectories=kept / "t")
    run(folder, tmp_path / "grown", limit=3)
    with pytest.raises(DataError, match="the set was extended 1 times"):
        run(folder, tmp_path / "grown", trajectories=tmp_path / "t")
