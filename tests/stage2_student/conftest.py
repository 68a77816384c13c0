"""A network small enough to train in a test, its checkpoint, and shards of random records for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.anytext2.checkpoint import export_state, write_checkpoint
from common.anytext2.config import NetworkConfig, load_network_config
from common.anytext2.unet import UNet
from common.anytext2.vae import VAE
from common.anytext2.writenet import WriteNet
from stage2_student.student import Student
from tests.golden_rule import rule_tensor

NETWORK = """
scale_factor = 1.0
[unet]
model_channels = 32
channel_mult = [1, 2]
num_res_blocks = 1
attention_resolutions = [1, 2]
num_heads = 4
attnx_mid = true
attnx_levels = [1]
[writenet]
glyph_widths = [4, 8, 8, 16]
position_widths = [4, 4, 8, 8]
[vae]
channels = 32
channel_mult = [1, 1, 1, 1]
num_res_blocks = 1
latent_channels = 4
[clip]
hidden_size = 16
intermediate_size = 32
num_layers = 1
num_heads = 2
"""


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """network.toml and base.safetensors: UNet, WriteNet and VAE with upstream's keys."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "network.toml").write_text(NETWORK)
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
