"""Every way to make a step faster gives the losses and gradients of the plain one: eager PEFT."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from common import compiling
from common.seeding import generator
from shards.reading.reader import ShardSet
from stage2_student.train import make_accelerator
from stage2_student.training.ancestry import Ancestry
from stage2_student.training.prepare import prepare
from stage2_student.training.trainer import Trainer
from tests.stage2_student.conftest import NETWORK, Configure, configure_for, write_base, write_shards

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


def test_compiled_steps_have_the_losses_and_gradients_of_the_plain_one(
    shallow: tuple[Path, Path], tmp_path: Path
) -> None:
    base, shards = shallow
    configure, lora = configure_for(base), {"lora": {"targets": ("to_k", "conv1"), **WRITENET}}
    expected = losses_and_gradients(make_trainer(configure, shards, tmp_path / "plain", lora), micro_batches=1)
    for name, settings in {"adapters": {}, "folded": FAST["both"]}.items():
        model = {**settings.get("model", {}), "compile": True}
        trainer = make_trainer(configure, shards, tmp_path / name, {**lora, **settings, "model": model})
        counters.clear()
        assert difference(losses_and_gradients(trainer, micro_batches=1), expected) < TOLERANCE, name
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"], name
