from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import Config, TrainConfig
from common.errors import DataError, Stopped, UsageError
from shards.reading.reader import ShardSet
from stage2_student.student.adapter import Card, find_adapter, load_tensors, read_card
from stage2_student.train import TrainResult, hold_run, make_accelerator, train
from stage2_student.training.runlog import read_log
from stage2_student.training.trainer import learning_rate
from tests.shards.builders import flip_bit
from tests.stage2_student.conftest import Configure, write_shards

TIMES = {"samples_per_second", "step_seconds", "data_wait_seconds", "seconds_left"}


def without_times(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_log(run)]


def weights(result: TrainResult, kind: str = "lora") -> dict[str, torch.Tensor]:
    assert result.checkpoint is not None
    return load_tensors(result.checkpoint / kind)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_trains_logs_and_leaves_an_adapter_with_its_card(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    config = configure(max_steps=6, ema_decay=0.9, gradient_accumulation=2, text_region_weight=3.0)
    result = train(config, shards=shards, run=tmp_path / "run", announce=lines.append)
    assert result.steps == 6 and result.loss is not None
    assert any("to_q" in line and "modules" in line for line in lines)
    assert "2 steps at t = [999, 499]" in lines[-1]
    listed = json.loads((result.run / "adapted.json").read_text())
    assert [(module["part"], module["name"]) for module in listed] == [(a.part, a.name) for a in result.adapted]
    log = read_log(result.run)
    assert [line["step"] for line in log] == [2, 4, 6]
    assert {"loss", "learning_rate", "grad_norm", "epoch"} | TIMES <= log[0].keys()
    assert log[-1]["epoch"] == 2  # 24 samples seen of 10
    assert list((result.run / "tensorboard").iterdir())
    card = read_card(result.checkpoint / "ema")  # type: ignore[operator]
    assert (card.num_steps, card.timesteps, card.step, card.sampler) == (2, (999, 499), 6, "ddim")
    assert json.loads((result.run / "config.json").read_text())["train"]["max_steps"] == 6
    assert not same(weights(result), weights(result, "ema"))


def test_older_checkpoints_keep_their_adapters_and_lose_what_only_a_resumed_run_needs(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    settings = {"checkpoint_every": 1, "keep_checkpoints": 2, "ema_decay": 0.9}
    run = train(configure(**settings, max_steps=4), shards=shards, run=tmp_path / "run").run
    old = run / "checkpoints/step-00000001"
    assert sorted(path.name for path in old.iterdir()) == ["checkpoint.json", "ema", "lora"]
    assert [len(list(c.glob("optimizer*"))) for c in sorted((run / "checkpoints").iterdir())] == [0, 0, 1, 1]
    assert find_adapter(old) == old / "ema" and read_card(old / "lora").step == 1
    with pytest.raises(DataError, match="only its adapter is left"):
        train(configure(**settings, max_steps=5), shards=shards, run=tmp_path / "other", resume=str(old))
    for name in ("step-00000003", "step-00000004"):
        injure(run / "checkpoints" / name)
    with pytest.raises(DataError, match="none of its 2 checkpoints is complete"):
        train(configure(**settings, max_steps=5), shards=shards, run=run, resume="auto")
    assert find_adapter(run) == run / "checkpoints/step-00000002/ema"

    none = configure(**settings, keep_adapters=False, max_steps=4)
    few = train(none, shards=shards, run=tmp_path / "few")
    assert len(list((few.run / "checkpoints").iterdir())) == 2
    assert same(weights(few), load_tensors(run / "checkpoints/step-00000004/lora"))


def test_a_run_stops_when_its_time_is_up_and_goes_on_to_the_same_bits(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    whole = train(configure(max_steps=3), shards=shards, run=tmp_path / "whole")
    for done in (1, 2):  # a limit that is over before the first step still makes one
        with pytest.raises(Stopped, match=rf"because its time is up; step {done} of 3 is in a checkpoint"):
            train(configure(max_steps=3), shards=shards, run=tmp_path / "run", resume="auto", max_minutes=1e-6)
    last = train(configure(max_steps=3), shards=shards, run=tmp_path / "run", resume="auto", max_minutes=60)
    assert (last.resumed_from, last.steps) == (2, 3)
    assert same(weights(last), weights(whole))


def test_learning_rates_rise_to_their_peak_and_fall_to_zero_as_their_schedule_says() -> None:
    def rates(schedule: str) -> list[float]:
        train = TrainConfig(schedule=schedule, learning_rate=1.0, warmup_steps=2, max_steps=10)  # type: ignore[arg-type]
        return [learning_rate(step, Config(train=train)) for step in range(12)]

    assert rates("constant") == [0.5] + [1.0] * 11
    falling = [1 - step / 8 for step in range(9)]
    assert rates("linear") == pytest.approx([0.5, 1.0, *falling, 0.0])
    assert rates("cosine") == pytest.approx(
        [0.5, 1.0, *(0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(9)), 0.0]
    )


def test_the_loss_goes_down(configure: Configure, shards: Path, tmp_path: Path) -> None:
    config = configure(max_steps=24, loss="l2", learning_rate=5e-3, log_every=6, batch_size=4)
    train(config, shards=shards, run=tmp_path / "run")
    losses = [line["loss"] for line in read_log(tmp_path / "run")]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    ("objective", "kind"),
    [("pcm", "shards"), ("x0", "shards_with_predictions"), ("lcm", "noised_shards")],
)
def test_every_objective_trains_on_the_shards_made_for_it(
    configure: Configure, request: pytest.FixtureRequest, objective: str, kind: str, tmp_path: Path
) -> None:
    config = configure(objective=objective, max_steps=2, ema_decay=0.9, pcm_target="ema")
    result = train(config, shards=request.getfixturevalue(kind), run=tmp_path / "run")
    assert any(bool(t.any()) for name, t in weights(result).items() if ".lora_B." in name)
    card = read_card(result.checkpoint / "lora")  # type: ignore[operator]
    assert (card.timesteps, card.sampler) == ((999, 499), "lcm" if objective == "lcm" else "ddim")


def test_the_writenet_can_be_adapted_and_half_precision_bases_train(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    lora = {"writenet": True, "writenet_targets": ("controlnet_down_blocks.*", "controlnet_mid_block")}
    half = {"model": {"dtype": "bfloat16"}, "mixed_precision": "bf16", "gradient_checkpointing": True}
    config = configure(max_steps=2, lora=lora, perceptual_weight=0.5, critic_weight=0.1, **half)
    result = train(config, shards=shards, run=tmp_path / "run")
    trained = weights(result)
    assert any(name.startswith("writenet.controlnet_mid_block") for name in trained)
    assert all(bool(t.any()) for name, t in trained.items() if ".lora_B." in name)
    assert {t.dtype for t in trained.values()} == {torch.float32}


def change(result: TrainResult, start: TrainResult) -> torch.Tensor:
    before, after = weights(start), weights(result)
    return torch.cat([(after[name] - before[name]).flatten() for name in sorted(after)])


def distance(a: TrainResult, b: TrainResult, start: TrainResult) -> float:
    """How far apart two trained students are, against how far training moved them."""
    return float((change(a, start) - change(b, start)).norm() / change(b, start).norm())


def test_gradient_checkpointing_and_accumulation_change_nothing(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    start = train(configure(batch_size=4, max_steps=1, warmup_steps=10**9), shards=shards, run=tmp_path / "start")
    once = train(configure(batch_size=4), shards=shards, run=tmp_path / "once")
    other = configure(batch_size=2, gradient_accumulation=2, gradient_checkpointing=True)
    twice = train(other, shards=shards, run=tmp_path / "twice")
    assert distance(twice, once, start) < 1e-3
    assert distance(start, once, start) == 1.0


def test_a_killed_and_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    """The checkpoint falls between two log lines; what follows it crosses an epoch."""
    settings = {"ema_decay": 0.9, "log_every": 3, "checkpoint_every": 2, "max_steps": 7, "schedule": "cosine"}
    whole = train(configure(**settings), shards=shards, run=tmp_path / "whole")
    run = tmp_path / "killed"  # what a process killed while it wrote its third checkpoint leaves behind
    shutil.copytree(whole.run, run)
    for step in (6, 7):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")
    shutil.copytree(run / "checkpoints/step-00000004", run / "checkpoints/.step-00000006.1-abc.tmp")
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')
    resumed = train(configure(**settings), shards=shards, run=run, resume="auto")
    assert resumed.resumed_from == 4
    assert without_times(run) == without_times(whole.run)
    assert [line["step"] for line in read_log(run)] == [3, 6, 7]
    assert same(weights(resumed), weights(whole))
    assert same(weights(resumed, "ema"), weights(whole, "ema"))
    assert not list((run / "checkpoints").glob(".*"))


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    settings = {"checkpoint_every": 2, "max_steps": 4}
    whole = train(configure(**settings), shards=shards, run=tmp_path / "run")
    expected = weights(whole)
    assert whole.checkpoint is not None
    damaged = whole.checkpoint / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    resumed = train(configure(**settings), shards=shards, run=tmp_path / "run", resume="auto")
    assert resumed.resumed_from == 2
    assert same(weights(resumed), expected)


def test_a_finished_run_is_left_as_it_is_and_goes_on_with_more_steps(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    first = train(configure(max_steps=2), shards=shards, run=tmp_path / "run")
    again = train(configure(max_steps=2), shards=shards, run=tmp_path / "run", resume="auto")
    assert (again.steps, again.loss, again.checkpoint) == (2, None, first.checkpoint)
    longer = train(configure(max_steps=4), shards=shards, run=tmp_path / "run", resume="auto")
    assert (longer.resumed_from, longer.steps) == (2, 4)


def test_resuming_with_other_settings_is_refused_and_names_them(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    train(configure(max_steps=2), shards=shards, run=tmp_path / "run")
    other = configure(max_steps=9, log_every=1, learning_rate=0.5, lora={"rank": 8})
    with pytest.raises(
        DataError,
        match=r"lora\.rank: received 8, expected 4; train\.learning_rate: received 0\.5, expected 0\.001\)",
    ):
        train(other, shards=shards, run=tmp_path / "run", resume="auto")


def test_settings_that_say_nothing_do_not_matter_and_those_of_later_versions_have_their_defaults(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    train(configure(max_steps=1), shards=shards, run=tmp_path / "run")
    idle = configure(max_steps=2, critic_learning_rate=0.1, critic_text_weight=0.0, perceptual_text_weight=2.0)
    assert train(idle, shards=shards, run=tmp_path / "run", resume="auto").resumed_from == 1
    with pytest.raises(DataError, match=r"train\.critic_weight: received 0\.5, expected 0\.0\)"):
        train(configure(critic_weight=0.5), shards=shards, run=tmp_path / "run", resume="auto")


def test_starting_over_an_existing_run_is_refused(configure: Configure, shards: Path, tmp_path: Path) -> None:
    train(configure(max_steps=1), shards=shards, run=tmp_path / "run")
    with pytest.raises(UsageError, match="--resume auto"):
        train(configure(max_steps=1), shards=shards, run=tmp_path / "run")


def test_two_trainings_in_one_folder_are_kept_apart(configure: Configure, shards: Path, tmp_path: Path) -> None:
    with (
        hold_run(tmp_path / "run"),
        pytest.raises(UsageError, match="another process is training"),
    ):
        train(configure(max_steps=1), shards=shards, run=tmp_path / "run")
    assert train(configure(max_steps=1), shards=shards, run=tmp_path / "run").steps == 1


def test_shards_added_later_do_not_reach_a_run_in_progress(
    configure: Configure, base_folder: Path, tmp_path: Path
) -> None:
    base = base_folder / "base.safetensors"
    shards = write_shards(tmp_path / "shards", base, samples=4)
    first = train(configure(max_steps=1), shards=shards, run=tmp_path / "run")
    write_shards(tmp_path / "more", base, samples=8)
    for path in (tmp_path / "more").glob("shard-000001.*"):
        shutil.copy(path, shards)
    resumed = train(configure(max_steps=2), shards=shards, run=tmp_path / "run", resume="auto")
    assert first.checkpoint is not None and resumed.checkpoint is not None
    old, new = read_card(first.checkpoint / "lora"), read_card(resumed.checkpoint / "lora")
    assert new.set_hash == old.set_hash


def test_shards_of_another_base_are_refused(configure: Configure, base_folder: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", base_folder / "base.safetensors", base_fingerprint="f" * 64)
    with pytest.raises(DataError, match="recorded on the base ffffffffffff, model.checkpoint is the base"):
        train(configure(), shards=shards, run=tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("shards", {"num_phases": 3}, "expected 1, 2, 4"),
        ("shards", {"objective": "lcm"}, 'of source "noised", received "rollout"'),
        ("shards", {"objective": "x0"}, "store_predictions = true"),
        ("noised_shards", {}, 'of source "rollout", received "noised"'),
        ("shards", {"lora": {"targets": ("to_z",)}}, "matches no linear layer"),
        ("shards", {"mixed_precision": "fp16"}, "needs a GPU"),
    ],
)
def test_settings_that_do_not_fit_the_shards_are_refused(
    configure: Configure,
    request: pytest.FixtureRequest,
    kind: str,
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=message):
        train(configure(**settings), shards=request.getfixturevalue(kind), run=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_shards_of_adjacent_solver_steps_are_refused(
    configure: Configure, base_folder: Path, tmp_path: Path
) -> None:
    shards = write_shards(tmp_path / "shards", base_folder / "base.safetensors", record_every=1)
    with pytest.raises(UsageError, match="record_every of 2 or more"):
        train(configure(states="all"), shards=shards, run=tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    config = configure(max_steps=50, learning_rate=1e30, warmup_steps=0, max_grad_norm=0.0, checkpoint_every=1)
    with pytest.raises(DataError, match=r"step \d+: the .* is not finite on sample 00000000\d \(index \d\)"):
        train(config, shards=shards, run=tmp_path / "run")


def injure(checkpoint: Path) -> None:
    state = checkpoint / "state.json"
    state.write_bytes(state.read_bytes()[:-1] + b" ")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    settings = {"checkpoint_every": 2, "max_steps": 4, "keep_checkpoints": 1}
    first = train(configure(**{**settings, "keep_checkpoints": 3}), shards=shards, run=tmp_path / "run")
    checkpoints = first.run / "checkpoints"
    for checkpoint in checkpoints.iterdir():
        injure(checkpoint)
    before = sorted(checkpoints.rglob("*"))
    with pytest.raises(DataError, match=r"none of its 2 checkpoints is complete \(step-00000004: .*restore one"):
        train(configure(**settings), shards=shards, run=first.run, resume="auto")
    assert sorted(checkpoints.rglob("*")) == before


def test_the_start_is_chosen_by_who_holds_the_lock(configure: Configure, shards: Path, tmp_path: Path) -> None:
    first = train(configure(max_steps=2), shards=shards, run=tmp_path / "run")
    injure(first.run / "checkpoints/step-00000002")
    with hold_run(first.run), pytest.raises(UsageError, match="another process is training"):
        train(configure(max_steps=2), shards=shards, run=first.run, resume="auto")


def test_another_split_of_the_same_samples_goes_on_in_the_same_order(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    settings = {"checkpoint_every": 2, "max_steps": 4}
    whole = train(configure(**settings, batch_size=2), shards=shards, run=tmp_path / "run")
    start = whole.run / "checkpoints/step-00000002"
    split = configure(**settings, batch_size=1, gradient_accumulation=2)
    resumed = train(split, shards=shards, run=tmp_path / "split", resume=str(start))
    assert resumed.resumed_from == 2
    a, b = weights(resumed), weights(whole)
    assert all(float((a[name] - b[name]).norm()) <= 1e-3 * float(b[name].norm()) + 1e-7 for name in b)
    with pytest.raises(DataError, match=r"samples a step .*: received 4, expected 2"):
        train(configure(**settings, batch_size=4), shards=shards, run=tmp_path / "other", resume=str(start))


def test_a_run_goes_on_without_samples_that_were_damaged_meanwhile(
    configure: Configure, base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = write_shards(tmp_path / "shards", base_folder / "base.safetensors")
    settings = {"checkpoint_every": 2, "keep_checkpoints": 9}
    run = tmp_path / "run"
    first = train(configure(**settings, max_steps=2), shards=shards, run=run)
    same_set = train(
        configure(**settings, max_steps=4), shards=shards, run=run, resume="auto", exclude_damaged=True
    )
    assert card_of(same_set).set_hash == card_of(first).set_hash and "damaged samples" not in caplog.text

    member = ShardSet.open(shards).table(1)[2].members[2]
    flip_bit(shards / "shard-000001.tar", 8 * member.offset)
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match="--exclude-damaged"):
        train(configure(**settings, max_steps=6), shards=shards, run=run, resume="auto")
    resumed = train(
        configure(**settings, max_steps=6), shards=shards, run=run, resume="auto", exclude_damaged=True
    )
    assert resumed.resumed_from == 4
    assert "7 stay" in caplog.text and "start of epoch 1" in caplog.text
    assert card_of(resumed).set_hash != card_of(first).set_hash

    shutil.copytree(run, tmp_path / "killed")  # before the first checkpoint of the new set: only its list is there
    shutil.rmtree(tmp_path / "killed/checkpoints/step-00000006")
    again = train(configure(**settings, max_steps=6), shards=shards, run=tmp_path / "killed", resume="auto")
    assert again.resumed_from == 4 and same(weights(again), weights(resumed))
    last = train(configure(**settings, max_steps=7), shards=shards, run=run, resume="auto")
    assert last.resumed_from == 6


def card_of(result: TrainResult) -> Card:
    assert result.checkpoint is not None
    return read_card(result.checkpoint / "lora")


def test_a_launcher_that_starts_one_process_of_several_is_named(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_accelerator(configure())
    assert "accelerate launch" not in caplog.text
    # what `accelerate launch --cpu --num_processes 2` sets, see the test that runs it
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    make_accelerator(configure())
    assert "started this one alone" in caplog.text
