"""A network small enough to train in a test, its checkpoint, and shards of random records for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from common.anytext2.checkpoint import export_state, write_checkpoint
from common.anytext2.conditioning import ConditioningBatch, Uncond
from common.anytext2.config import NetworkConfig, load_network_config
from common.anytext2.fingerprint import fingerprint
from common.anytext2.unet import UNet
from common.anytext2.vae import VAE
from common.anytext2.writenet import WriteNet
from common.config import Config, LoraConfig, ModelConfig, TrainConfig
from common.schedule import trailing_timesteps
from shards.files.manifest import create_or_check
from shards.records.meta import SampleMeta
from shards.records.record import Record
from shards.writing.writer import ShardWriter
from stage2_student.student.student import Student
from tests.golden_rule import rule_tensor

NETWORK = """
scale_factor = 1.0
[unet]
model_channels = 16
norm_groups = 4
channel_mult = [1, 2]
num_res_blocks = 1
attention_resolutions = [1, 2]
num_heads = 2
attnx_mid = true
attnx_levels = [1]
[writenet]
glyph_widths = [4, 8, 8, 16]
position_widths = [4, 4, 8, 8]
[vae]
channels = 8
norm_groups = 4
channel_mult = [1, 2, 2]
num_res_blocks = 1
latent_channels = 6
[clip]
hidden_size = 16
intermediate_size = 32
num_layers = 1
num_heads = 2
"""


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """network.toml and base.safetensors: UNet, WriteNet and VAE with upstream's keys."""
    return write_base(tmp_path_factory.mktemp("base"), NETWORK)


def write_base(folder: Path, sizes: str) -> Path:
    """Write a network of these sizes and its weights, which are made by rule."""
    (folder / "network.toml").write_text(sizes)
    network = load_network_config(folder / "network.toml")
    tensors = {
        key: rule_tensor(key, tuple(tensor.shape))
        for part, module in (("unet", UNet(network)), ("writenet", WriteNet(network)), ("vae", VAE(network)))
        for key, tensor in export_state(module, part, network).items()
    }
    write_checkpoint(folder / "base.safetensors", tensors)
    return folder


@pytest.fixture(scope="session")
def network(base_folder: Path) -> NetworkConfig:
    return load_network_config(base_folder / "network.toml")


@pytest.fixture
def student(network: NetworkConfig, base_folder: Path) -> Student:
    from common.anytext2.checkpoint import load_unet, load_writenet

    checkpoint = base_folder / "base.safetensors"
    return Student(load_unet(network, checkpoint), load_writenet(network, checkpoint))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


SIZE, STRIDE, CHANNELS, STATES, CONTEXT = 32, 4, 6, 4, 16


def make_record(index: int, *, source: str = "rollout", predictions: bool = False, rollouts: int = 2) -> Record:
    """A record of random tensors that depend on its index alone; every third caption has two chunks."""
    g = torch.Generator().manual_seed(1000 + index)
    side, chunks = SIZE // STRIDE, 2 if index % 3 == 0 else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).half()

    meta = SampleMeta(
        input_id=f"input-{index}",
        caption="a sign",
        text_caption="Texts are *",
        texts=("OPEN",),
        languages=("Latin",),
        polygons=(((4.0, 4.0), (28.0, 4.0), (28.0, 12.0), (4.0, 12.0)),),
        mode="generate",
        source=source,
        seeds=tuple(range(rollouts)),
        size=(SIZE, SIZE),
        guidance_scale=7.5,
    )
    timesteps = trailing_timesteps(STATES)
    if source == "noised":
        timesteps = torch.randint(0, 1000, (STATES,), generator=g)
    positions = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
    positions[:, 4:12, 4:28] = 1
    return Record(
        meta=meta,
        image_context=normal(77 * chunks, CONTEXT),
        text_context=normal(77, CONTEXT),
        masked_latents=normal(CHANNELS, side, side),
        rollout_latents=normal(rollouts, STATES + 1, CHANNELS, side, side),
        rollout_timesteps=timesteps,
        glyphs=(torch.rand(1, SIZE, SIZE, generator=g) > 0.8).to(torch.uint8),
        positions=positions,
        x0_cond=normal(rollouts, STATES, CHANNELS, side, side) if predictions else None,
        x0_uncond=normal(rollouts, STATES, CHANNELS, side, side) if predictions else None,
    )


def stack(records: Sequence[Record]) -> ConditioningBatch:
    return ConditioningBatch.stack([record.conditioning for record in records])


def write_shards(
    folder: Path,
    base: Path,
    *,
    samples: int = 10,
    per_shard: int = 4,
    record_every: int = 10,
    base_fingerprint: str | None = None,
    **record: object,
) -> Path:
    """Write a set as stage one does, from `make_record`."""
    source = str(record.get("source", "rollout"))
    identity = {
        "base_fingerprint": base_fingerprint or fingerprint(base, "base"),
        "config": {"precompute": {"record_every": record_every, "source": source}},
    }
    uncond = Uncond(image_context=torch.zeros(77, CONTEXT).half(), text_context=torch.zeros(77, CONTEXT).half())
    manifest, _ = create_or_check(folder, identity, {}, lambda: uncond)
    for shard, first in enumerate(range(0, samples, per_shard)):
        with ShardWriter(folder, shard, identity_sha256=manifest.identity_sha256, provenance={}) as writer:
            for index in range(first, min(first + per_shard, samples)):
                writer.add(index, make_record(index, **record))  # type: ignore[arg-type]
            writer.commit()
    return folder


@pytest.fixture(scope="session")
def shards(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten records of four states and two rollouts."""
    return write_shards(tmp_path_factory.mktemp("shards"), base_folder / "base.safetensors")


@pytest.fixture(scope="session")
def shards_with_predictions(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), base_folder / "base.safetensors", predictions=True)


@pytest.fixture(scope="session")
def noised_shards(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, base_folder / "base.safetensors", predictions=True, source="noised")


Configure = Callable[..., Config]


@pytest.fixture
def configure(base_folder: Path) -> Configure:
    return configure_for(base_folder)


def configure_for(base_folder: Path) -> Configure:
    """Make a configuration of the small base; keywords go to [train], `lora` and `model` to theirs."""

    def make(*, lora: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any) -> Config:
        defaults: dict[str, Any] = {
            "num_phases": 2,
            "max_steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "num_workers": 0,
            "log_every": 2,
            "checkpoint_every": 100,
        }
        return Config(
            model=ModelConfig(
                network=str(base_folder / "network.toml"),
                checkpoint=str(base_folder / "base.safetensors"),
                device="cpu",
                **(model or {}),
            ),
            train=TrainConfig(**{**defaults, **train}),
            lora=LoraConfig(**{"rank": 4, "alpha": 4.0, "targets": ("to_q", "conv1"), **(lora or {})}),
        )

    return make


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Each run of a process chooses its own precision; accelerate keeps the first one's in a singleton."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
