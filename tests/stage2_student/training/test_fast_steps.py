"""Every way to make a step faster gives the losses and gradients of the plain one: eager PEFT."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._dynamo.utils import counters

from common import compiling
from common.errors import DataError
from common.seeding import generator
from shards.reading.reader import ShardSet
from stage2_student.student.folding import FoldedAdapters
from stage2_student.student.lora import adapt, adapted_layers, lora_pair
from stage2_student.train import TrainResult, make_accelerator, train
from stage2_student.training import trainer as trainer_module
from stage2_student.training.ancestry import Ancestry
from stage2_student.training.phases import Draws, draw
from stage2_student.training.prepare import prepare
from stage2_student.training.runlog import read_log
from stage2_student.training.trainer import Trainer
from tests.stage2_student.conftest import NETWORK, Configure, configure_for, write_base, write_shards
from tests.stage2_student.test_train import same, weights

TOLERANCE = 1e-4
"""Relative, for float32."""
TARGETS = ("to_q", "to_k", "to_out.0", "proj_in", "conv1", "conv_shortcut", "ff.net.2")
WRITENET = {"writenet": True, "writenet_targets": ("to_q", "conv2", "controlnet_mid_block")}
"""Linear layers, 3x3 and 1x1 convolutions."""
SHALLOW = (
    NETWORK.replace("channel_mult = [1, 2]", "channel_mult = [1]")
    .replace("attention_resolutions = [1, 2]", "attention_resolutions = [1]")
    .replace("attnx_levels = [1]", "attnx_levels = [0]")
)


@pytest.fixture(autouse=True)
def compiled_fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace whole networks as TorchInductor's are, and leave out its code generation, which takes a minute."""
    monkeypatch.setattr(
        compiling, "compile_network", functools.partial(compiling.compile_network, backend="aot_eager")
    )
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_trainer(configure: Configure, shards: Path, run: Path, settings: dict[str, Any]) -> Trainer:
    """A trainer whose adapters, and their average, are as after some training."""
    lora = {"targets": TARGETS, "alpha": 6.0, **settings.get("lora", {})}
    config = configure(**{"batch_size": 3, **settings, "lora": lora})
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the trainer before
    dataset = ShardSet.open(shards)
    trainer, _ = prepare(config, make_accelerator(config), dataset, run, None, Ancestry())
    fill(trainer.learner.parameters, "weights")
    if trainer.learner.ema is not None:
        fill(trainer.learner.ema.values, "average")
    if trainer.learner.folded is not None:
        trainer.learner.folded.refresh()
    return trainer


@torch.no_grad()
def fill(tensors: dict[str, Any], what: str) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator(what, name)))


def losses_and_gradients(trainer: Trainer, micro_batches: int = 2) -> dict[str, Tensor]:
    found, batches = {}, iter(trainer.loader)
    for number in range(micro_batches):
        losses = trainer.losses(next(batches))
        trainer.accelerator.backward(losses.mean() / micro_batches)
        found[f"loss {number}"] = losses.detach()
    gradients = {name: p.grad for name, p in trainer.learner.parameters.items()}
    return found | {name: gradient for name, gradient in gradients.items() if gradient is not None}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of any tensor."""
    assert found.keys() == expected.keys() and len(found) > 20
    assert all(float(tensor.norm()) > 0 for tensor in expected.values())
    return max(float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items())


FAST: dict[str, dict[str, Any]] = {
    "folded": {"fold_adapters": True},
    "channels last": {"model": {"channels_last": True}},
    "both": {"fold_adapters": True, "model": {"channels_last": True}},
}
WHAT: dict[str, dict[str, Any]] = {
    "starts": {},
    "checkpointing": {"gradient_checkpointing": True},
    "perceptual, draws": {"perceptual_weight": 0.5, "perceptual_text_weight": 3.0, "draws_per_sample": 2},
    "perceptual, unrolled, checkpointing": {
        "perceptual_weight": 0.5,
        "objective": "unrolled",
        "gradient_checkpointing": True,
    },
    "critic, draws": {"critic_weight": 0.5, "critic_text_weight": 0.0, "draws_per_sample": 2},
    "pcm with ema": {"objective": "pcm", "pcm_target": "ema", "ema_decay": 0.9},
    "WriteNet": {"lora": WRITENET},
    "WriteNet, pcm with ema, checkpointing, draws": {
        "lora": WRITENET,
        "objective": "pcm",
        "pcm_target": "ema",
        "ema_decay": 0.9,
        "gradient_checkpointing": True,
        "draws_per_sample": 2,
    },
}


@pytest.mark.parametrize("what", WHAT)
def test_fast_steps_have_the_losses_and_gradients_of_the_plain_one(
    configure: Configure, shards: Path, what: str, tmp_path: Path
) -> None:
    expected = losses_and_gradients(make_trainer(configure, shards, tmp_path / "plain", WHAT[what]))
    for name, settings in FAST.items():
        trainer = make_trainer(configure, shards, tmp_path / name, {**WHAT[what], **settings})
        assert difference(losses_and_gradients(trainer), expected) < TOLERANCE, name


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of one level, quick to trace, and shards of it."""
    folder = write_base(tmp_path_factory.mktemp("base"), SHALLOW)
    return folder, write_shards(tmp_path_factory.mktemp("shards"), folder / "base.safetensors", samples=4)


@pytest.mark.parametrize("looks", [{}, {"perceptual_weight": 0.5, "critic_weight": 0.5}], ids=str)
def test_compiled_steps_have_the_losses_and_gradients_of_the_plain_one(
    shallow: tuple[Path, Path], tmp_path: Path, looks: dict[str, float]
) -> None:
    """What the frozen base sees of landed states is not compiled."""
    base, shards = shallow
    configure, lora = configure_for(base), {"lora": {"targets": ("to_k", "conv1"), **WRITENET}, **looks}
    expected = losses_and_gradients(make_trainer(configure, shards, tmp_path / "plain", lora), micro_batches=1)
    for name, settings in {"adapters": {}, "folded": FAST["both"]}.items():
        model = {**settings.get("model", {}), "compile": True}
        trainer = make_trainer(configure, shards, tmp_path / name, {**lora, **settings, "model": model})
        counters.clear()
        assert difference(losses_and_gradients(trainer, micro_batches=1), expected) < TOLERANCE, name
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"], name


RUN = {"max_steps": 4, "checkpoint_every": 2, "ema_decay": 0.9, "gradient_accumulation": 2}


def gap(a: TrainResult, b: TrainResult, kind: str = "lora") -> float:
    """The largest relative difference between two students' tensors."""
    found, expected = weights(a, kind), weights(b, kind)
    assert found.keys() == expected.keys()
    return max(float((found[n] - t).norm() / t.norm().clamp(min=1e-6)) for n, t in expected.items())


def test_a_folded_run_is_the_plain_run_and_each_goes_on_from_the_others_checkpoints(
    configure: Configure, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(configure(**RUN), shards=shards, run=tmp_path / "plain")
    folded = train(configure(**RUN, fold_adapters=True), shards=shards, run=tmp_path / "folded")
    halfway = "checkpoints/step-00000002"
    again = train(
        configure(**RUN, fold_adapters=True),
        shards=shards,
        run=tmp_path / "again",
        resume=str(folded.run / halfway),
    )
    assert same(weights(again), weights(folded)) and same(weights(again, "ema"), weights(folded, "ema"))
    assert "rounding" not in caplog.text
    for fold, start in ((True, plain), (False, folded)):
        config, run = configure(**RUN, fold_adapters=fold), tmp_path / f"to-{fold}"
        mixed = train(config, shards=shards, run=run, resume=str(start.run / halfway))
        assert f"goes on with train.fold_adapters = {str(fold).lower()}: " in caplog.text
        for kind in ("lora", "ema"):
            assert gap(mixed, plain, kind) < 1e-3 and gap(folded, plain, kind) < 1e-3


def test_a_folded_run_starts_from_another_runs_weights(configure: Configure, shards: Path, tmp_path: Path) -> None:
    ancestor = train(
        configure(max_steps=2, learning_rate=0.1, warmup_steps=0), shards=shards, run=tmp_path / "one"
    )
    losses = {}
    for name, settings in {"fresh": {}, "plain": {}, "folded": {"fold_adapters": True}}.items():
        start = None if name == "fresh" else ancestor.run
        config = configure(max_steps=1, **settings)
        losses[name] = train(config, shards=shards, run=tmp_path / name, ancestor=start).loss
    assert losses["folded"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["folded"] != pytest.approx(losses["fresh"], rel=1e-2)


def test_the_held_out_loss_of_a_compiled_run_compiles_nothing(shallow: tuple[Path, Path], tmp_path: Path) -> None:
    """Three records in batches of two: the last one is of a shape that no step has."""
    base, shards = shallow
    other = write_shards(tmp_path / "held-out", base / "base.safetensors", samples=3, rollouts=1)
    found = []
    for compile_ in (False, True):
        config = configure_for(base)(model={"compile": compile_}, max_steps=1, lora={"targets": ("to_k",)})
        counters.clear()
        run = train(config, shards=shards, run=tmp_path / f"run-{compile_}", held_out=other).run
        found.append([line["held_out_loss"] for line in read_log(run) if "held_out_loss" in line])
    assert counters["stats"]["unique_graphs"] == 2  # UNet and WriteNet of the step
    assert found[1] == pytest.approx(found[0], rel=1e-5) and len(found[0]) == 1


HALF: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "mixed_precision": "bf16"}


def test_in_half_precision_folded_adapters_err_no_more_than_pefts(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    exact = losses_and_gradients(make_trainer(configure, shards, tmp_path / "exact", {}))
    plain, folded = (
        losses_and_gradients(
            make_trainer(configure, shards, tmp_path / str(fold), {**HALF, "fold_adapters": fold})
        )
        for fold in (False, True)
    )

    def errors(found: dict[str, Tensor]) -> Tensor:
        return torch.stack([(found[name].float() - t).norm() / t.norm() for name, t in exact.items()])

    assert {tensor.dtype for tensor in folded.values()} == {torch.float32}
    assert float(errors(folded).mean()) < 1.1 * float(errors(plain).mean()) < 0.2


def test_autocast_converts_what_goes_into_adapters_to_the_same_bits(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(configure, shards, tmp_path / "run", HALF)
    layers = adapted_layers(trainer.student)
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers.values())
    left = losses_and_gradients(trainer, micro_batches=1)
    trainer.optimizer.zero_grad()
    for layer in layers.values():
        layer.cast_input_dtype_enabled = True  # as PEFT has it
    batch = next(iter(make_trainer(configure, shards, tmp_path / "other", HALF).loader))
    losses = trainer.losses(batch)
    trainer.accelerator.backward(losses.mean())
    assert torch.equal(losses, left.pop("loss 0"))
    assert all(torch.equal(trainer.learner.parameters[name].grad, gradient) for name, gradient in left.items())  # type: ignore[arg-type]


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(128, 128, bias=False)


def moved_along(base: Tensor, size: float) -> float:
    """How far bfloat16 weights move in the direction of their adapter, against how far they should."""
    network = Linear()
    network.layer.weight.data = base.clone()
    adapt(network, "unet", {"layer": "layer"}, rank=4, alpha=4.0, seed=0)
    a, b = lora_pair(adapted_layers(network)["layer"])
    folded = FoldedAdapters([network], dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    before = network.layer.weight.detach().float().clone()
    with torch.no_grad():
        b.copy_(size * torch.randn(b.shape, generator=generator("b")))
    folded.refresh()
    update = (b @ a).detach()
    moved = network.layer.weight.detach().float() - before
    return float((moved * update).sum() / (update * update).sum())


def test_small_updates_reach_bfloat16_weights_on_average_but_not_those_that_were_rounded_before() -> None:
    base = 0.05 * torch.randn(128, 128, generator=generator("base"))
    assert 0.7 < moved_along(base, 1e-4) < 1.3
    assert moved_along(base.bfloat16().float(), 1e-4) < 0.3
    assert moved_along(base, 1e-1) == pytest.approx(1, abs=0.01)


def test_what_cannot_be_folded_is_refused() -> None:
    network = Linear()
    network.layer = nn.Linear(8, 8, dtype=torch.bfloat16)
    adapt(network, "unet", {"layer": "layer"}, rank=2, alpha=2.0, seed=0)
    with pytest.raises(ValueError, match="float32"):
        FoldedAdapters([network], dtype=torch.bfloat16, compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("lora", [{}, WRITENET])
def test_several_draws_of_a_sample_count_as_one_and_run_writenet_once(
    configure: Configure, shards: Path, lora: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a sample is the mean of those of its draws, each as if it were alone."""
    settings = {"num_phases": 4, "text_region_weight": 3.0, "lora": lora}
    several = make_trainer(configure, shards, tmp_path / "several", {**settings, "draws_per_sample": 3})
    single = make_trainer(configure, shards, tmp_path / "single", settings)
    batch = next(iter(several.loader))
    rows = []
    several.student.writenet.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    found = several.losses(batch)
    assert rows == [3] and found.shape == (3,)

    def numbered(number: int) -> Callable[..., Draws]:
        def draw_one(*args: Any, **kwargs: Any) -> Draws:
            return draw(*args, **{**kwargs, "per_sample": 3}).map(
                lambda drawn: drawn.view(3, 3)[:, number].contiguous()
            )

        return draw_one

    one_by_one = []
    for number in range(3):
        monkeypatch.setattr(trainer_module, "draw", numbered(number))
        one_by_one.append(single.losses(batch))
    torch.testing.assert_close(found, torch.stack(one_by_one).mean(0), rtol=1e-5, atol=0)
    assert not torch.equal(one_by_one[0], one_by_one[1])


def test_the_number_of_draws_is_what_a_resumed_run_must_share(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    run = train(configure(max_steps=1, draws_per_sample=2), shards=shards, run=tmp_path / "run").run
    with pytest.raises(DataError, match=r"train\.draws_per_sample: received .*, expected 2"):
        train(configure(max_steps=2), shards=shards, run=run, resume="auto")
    again = train(configure(max_steps=2, draws_per_sample=2), shards=shards, run=run, resume="auto")
    assert again.resumed_from == 1


def test_a_deterministic_run_is_the_same_run(
    configure: Configure, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU all of these algorithms give the same bits anyway."""
    plain = train(configure(max_steps=2), shards=shards, run=tmp_path / "plain")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("TORCHINDUCTOR_DETERMINISTIC", "1")
    try:
        asked = train(configure(max_steps=2, deterministic=True), shards=shards, run=tmp_path / "asked")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(weights(asked), weights(plain))
