"""Progressive students: a run that starts from another run's adapter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.errors import DataError, UsageError
from stage2_student.student.adapter import find_adapter, load_tensors, read_card, save_adapter
from stage2_student.student.ancestors import hash_adapter
from stage2_student.student.export import export
from stage2_student.train import TrainResult, train
from stage2_student.training.checkpoint import read_state
from tests.stage2_student.conftest import Configure, configure_for, write_shards
from tests.stage2_student.test_train import card_of, same, weights, without_times

STILL = {"learning_rate": 1e-30, "warmup_steps": 0}
"""So small a rate that no weight moves."""


@pytest.fixture(scope="module")
def four(base_folder: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A student of four steps that keeps an average of its weights; no test changes its run."""
    torch.set_num_threads(1)
    config = configure_for(base_folder)(num_phases=4, max_steps=3, ema_decay=0.9, checkpoint_every=2)
    return train(config, shards=shards, run=tmp_path_factory.mktemp("runs") / "four")


def test_a_run_starts_with_its_ancestors_average_bit_for_bit_and_everything_else_anew(
    configure: Configure, shards: Path, four: TrainResult, tmp_path: Path
) -> None:
    lines: list[str] = []
    config = configure(num_phases=1, max_steps=1, ema_decay=0.5, **STILL)
    one = train(config, shards=shards, run=tmp_path / "one", ancestor=four.run, announce=lines.append)
    expected = weights(four, "ema")
    assert not same(expected, weights(four))
    assert same(weights(one), expected)
    assert same(weights(one, "ema"), expected)  # an average begins at the weights
    assert (one.steps, one.resumed_from) == (1, None)
    assert card_of(one).timesteps == (999,)
    assert any(
        "starts from" in line and "a student of 4 steps, phased, after 3 training steps" in line for line in lines
    )

    fresh = train(config, shards=shards, run=tmp_path / "fresh")
    assert one.checkpoint is not None and fresh.checkpoint is not None
    assert read_state(one.checkpoint)[0].loader == read_state(fresh.checkpoint)[0].loader


def test_every_way_to_name_an_ancestor_means_its_weights(
    configure: Configure, shards: Path, four: TrainResult, tmp_path: Path
) -> None:
    assert four.checkpoint is not None
    exported = tmp_path / "four.safetensors"
    export(configure(), four.run, "diffusers", exported)  # alpha is the rank, so that the weights are the same
    named = {
        "checkpoint": (
            four.run / "checkpoints/step-00000002",
            load_tensors(four.run / "checkpoints/step-00000002/ema"),
        ),
        "older": (
            four.run / "checkpoints/step-00000002",
            load_tensors(four.run / "checkpoints/step-00000002/ema"),
        ),
        "adapter": (four.checkpoint / "lora", weights(four)),
        "export": (exported, weights(four, "ema")),
    }
    for name, (path, expected) in named.items():
        result = train(configure(max_steps=1, **STILL), shards=shards, run=tmp_path / name, ancestor=path)
        assert same(weights(result), expected), name
        assert card_of(result).ancestors[-1].adapter_sha256 == hash_adapter(expected)


def test_the_card_names_ancestors_of_ancestors_and_exports_carry_them(
    configure: Configure, shards: Path, four: TrainResult, base_folder: Path, tmp_path: Path
) -> None:
    other = write_shards(tmp_path / "other", base_folder / "base.safetensors", samples=5)
    two = train(
        configure(num_phases=2, max_steps=2, objective="pcm"),
        shards=other,
        run=tmp_path / "two",
        ancestor=four.run,
    )
    one = train(configure(num_phases=1, max_steps=1), shards=shards, run=tmp_path / "one", ancestor=two.run)
    first, second = card_of(one).ancestors
    assert (first.objective, first.num_phases, first.step) == ("phased", 4, 3)
    assert (second.objective, second.timesteps, second.step) == ("pcm", (999, 499), 2)
    assert (first.set_hash, second.set_hash) == (card_of(four).set_hash, card_of(two).set_hash)
    assert first.set_hash != second.set_hash
    assert first.adapter_sha256 == hash_adapter(weights(four, "ema"))
    assert second.adapter_sha256 == hash_adapter(weights(two))
    assert card_of(two).ancestors == (first,)
    for layout in ("diffusers", "kohya", "merged"):
        file = tmp_path / f"{layout}.safetensors"
        export(configure(), one.run, layout, file)
        assert read_card(file).ancestors == (first, second)


def test_a_run_without_ancestors_says_nothing_of_any(four: TrainResult) -> None:
    assert four.checkpoint is not None
    assert "ancestors" not in json.loads((four.checkpoint / "lora/student.json").read_bytes())
    assert "ancestor" not in read_state(four.checkpoint)[1]
    assert not (four.run / "ancestors.json").exists()


def test_a_killed_run_with_an_ancestor_resumes_to_the_same_bits_and_needs_it_no_more(
    configure: Configure, shards: Path, four: TrainResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(num_phases=1, max_steps=5, ema_decay=0.9, checkpoint_every=2, log_every=3)
    whole = train(config, shards=shards, run=tmp_path / "whole", ancestor=four.run)
    assert read_state(whole.run / "checkpoints/step-00000002")[1]["ancestor"] == hash_adapter(weights(four, "ema"))
    for name, ancestor in (("with", four.run), ("gone", tmp_path / "nothing")):
        killed = tmp_path / name
        shutil.copytree(whole.run, killed)
        for step in (4, 5):
            shutil.rmtree(killed / f"checkpoints/step-{step:08d}")
        resumed = train(config, shards=shards, run=killed, resume="auto", ancestor=ancestor)
        assert resumed.resumed_from == 2
        assert same(weights(resumed), weights(whole)) and same(weights(resumed, "ema"), weights(whole, "ema"))
        assert without_times(killed) == without_times(whole.run)
        assert card_of(resumed).ancestors == card_of(whole).ancestors
        assert (killed / "ancestors.json").read_bytes() == (whole.run / "ancestors.json").read_bytes()
    assert "it is not needed" in caplog.text


def test_a_run_killed_before_its_first_checkpoint_does_not_start_without_its_ancestor(
    configure: Configure, shards: Path, four: TrainResult, tmp_path: Path
) -> None:
    config, run = configure(max_steps=1, **STILL), tmp_path / "run"
    train(config, shards=shards, run=run, ancestor=four.run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UsageError, match="begun from another run's adapter .* give --from again"):
        train(config, shards=shards, run=run, resume="auto")
    again = train(config, shards=shards, run=run, resume="auto", ancestor=four.run)
    assert same(weights(again), weights(four, "ema"))

    shutil.rmtree(run / "checkpoints")
    fresh = train(config, shards=shards, run=run)  # not asked to go on: a run of its own
    assert not card_of(fresh).ancestors and not (run / "ancestors.json").exists()


def test_a_run_that_goes_on_takes_no_other_ancestor(
    configure: Configure, shards: Path, four: TrainResult, tmp_path: Path
) -> None:
    config = configure(max_steps=1)
    run = train(config, shards=shards, run=tmp_path / "run", ancestor=four.run).run
    more = configure(max_steps=2)
    with pytest.raises(UsageError, match="holds a run; go on with it by --resume auto"):
        train(more, shards=shards, run=run, ancestor=four.run)
    older = four.run / "checkpoints/step-00000002"
    with pytest.raises(
        DataError, match=r"started from another adapter \(received \w{12} of step 2, expected \w{12} of step 3\)"
    ):
        train(more, shards=shards, run=run, resume="auto", ancestor=older)
    with pytest.raises(DataError, match="was not started from an adapter"):
        train(
            configure(num_phases=4, max_steps=9, ema_decay=0.9),
            shards=shards,
            run=four.run,
            resume="auto",
            ancestor=run,
        )
    assert train(more, shards=shards, run=run, resume="auto").steps == 2


def test_an_adapter_of_another_kind_is_refused_and_every_difference_named(
    configure: Configure, shards: Path, four: TrainResult, tmp_path: Path
) -> None:
    tensors, card = load_tensors(find_adapter(four.run)), read_card(find_adapter(four.run))
    alien = tmp_path / "alien"
    save_adapter(alien, tensors, replace(card, base_fingerprint="f" * 64))
    config = configure(lora={"rank": 8, "alpha": 2.0, "targets": ("to_q", "to_k")})
    with pytest.raises(DataError, match="cannot start from an adapter of another kind") as caught:
        train(config, shards=shards, run=tmp_path / "run", ancestor=alien)
    said = str(caught.value)
    assert f"base: received {card.base_fingerprint[:12]}, expected ffffffffffff" in said
    assert "lora.rank: received 8, expected 4" in said
    assert "lora.alpha: received 2.0, expected 4.0" in said
    assert ".attn1.to_k and " in said and "only here" in said
    assert ".conv1 and " in said and "only in the adapter" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_is_no_adapter_or_damaged_is_refused(
    configure: Configure, shards: Path, four: TrainResult, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no adapter there"):
        train(configure(), shards=shards, run=tmp_path / "run", ancestor=tmp_path / "nothing")
    assert four.checkpoint is not None
    copy = tmp_path / four.checkpoint.name
    shutil.copytree(four.checkpoint, copy)
    file = copy / "ema/unet/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match=r"adapter_model\.safetensors does not match"):
        train(configure(), shards=shards, run=tmp_path / "run", ancestor=copy / "ema")


def test_hashes_tell_weights_apart() -> None:
    tensors = {"b": torch.zeros(2, 3), "a": torch.ones(4)}
    assert hash_adapter(tensors) == hash_adapter(dict(sorted(tensors.items())))
    for other in ({"a": torch.ones(4), "b": torch.zeros(3, 2)}, {"a": torch.ones(4), "c": torch.zeros(2, 3)}):
        assert hash_adapter(tensors) != hash_adapter(other)
