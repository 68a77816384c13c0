from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from common.anytext2.checkpoint import load_unet, load_writenet
from common.anytext2.checkpoint_file import CheckpointFile
from common.anytext2.config import NetworkConfig
from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.errors import DataError
from stage2_student.student.adapter import Card, save_adapter
from stage2_student.student.export import export_diffusers, export_kohya, export_merged
from stage2_student.student.sample import LoadedStudent
from stage2_student.student.student import Student, add_adapters
from tests.stage2_student.conftest import Configure, make_record, stack

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")


@pytest.fixture
def config(configure: Configure) -> Config:
    zero = ("controlnet_down_blocks.*", "controlnet_mid_block", "to_q")
    return configure(
        lora={"targets": ATTENTION + CONVOLUTIONS, "alpha": 2.0, "writenet": True, "writenet_targets": zero}
    )


@pytest.fixture
def adapter(config: Config, network: NetworkConfig, base_folder: Path, tmp_path: Path) -> Path:
    """Random weights, alpha half the rank."""
    checkpoint = base_folder / "base.safetensors"
    student = Student(load_unet(network, checkpoint), load_writenet(network, checkpoint))
    add_adapters(student, config)
    generator = torch.Generator().manual_seed(0)
    tensors = {n: 0.05 * torch.randn(p.shape, generator=generator) for n, p in student.trainable().items()}
    card = Card(
        objective="phased",
        sampler="ddim",
        timesteps=(999, 499),
        step=7,
        rank=4,
        alpha=2.0,
        base_fingerprint=fingerprint(checkpoint, "base"),
        set_hash="0" * 64,
        config=config.as_dict(),
    )
    save_adapter(tmp_path / "adapter", tensors, card)
    return tmp_path / "adapter"


def eps(student: Student) -> torch.Tensor:
    conditioning = stack([make_record(0), make_record(1)]).to("cpu", torch.float32)
    z = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return student(z, torch.tensor([999, 499]), conditioning)


@pytest.fixture
def expected(config: Config, adapter: Path) -> torch.Tensor:
    return eps(LoadedStudent.load(config, adapter).student)


def test_diffusers_own_loader_takes_the_exported_lora(
    student: Student, adapter: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "lora.safetensors"
    assert export_diffusers(adapter, out) > 40
    before = eps(student)
    state = load_file(out)
    student.unet.load_lora_adapter(state, prefix="unet")
    student.writenet.load_lora_adapter(state, prefix="writenet")
    torch.testing.assert_close(eps(student), expected, rtol=1e-4, atol=1e-4)
    assert float((before - expected).abs().max()) > 1e-2


def test_the_exported_file_says_how_to_sample(adapter: Path, tmp_path: Path) -> None:
    export_kohya(adapter, tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["timesteps"] == "[999, 499]" and metadata["num_inference_steps"] == "2"
    assert metadata["guidance_scale"] == "1.0"


def test_diffusers_reads_the_kohya_file_as_the_same_lora(
    configure: Configure, network: NetworkConfig, base_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    """Through the converter of stock pipelines, for what these know: they have neither AttnX nor WriteNet."""
    export_kohya(adapter, tmp_path / "kohya.safetensors")
    export_diffusers(adapter, tmp_path / "diffusers.safetensors")
    stock = {
        key: tensor
        for key, tensor in load_file(tmp_path / "kohya.safetensors").items()
        if key.startswith("lora_unet_") and "attn1x" not in key and "attn2x" not in key
    }
    modules = {key.split(".")[0] for key in stock}
    converted, alphas = StableDiffusionPipeline.lora_state_dict(dict(stock))
    assert set(alphas.values()) == {2.0}
    reference = load_file(tmp_path / "diffusers.safetensors")
    unet = load_unet(network, base_folder / "base.safetensors")
    unet.load_lora_adapter(converted, prefix="unet", network_alphas=alphas)
    found = {name: module for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    assert len(found) == len(modules)
    for name, layer in found.items():
        b = reference[f"unet.{name}.lora_B.weight"].flatten(1) @ reference[f"unet.{name}.lora_A.weight"].flatten(1)
        delta = layer.get_delta_weight("default_0").flatten(1)
        torch.testing.assert_close(delta, b.view_as(delta), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_the_merged_checkpoint_is_the_student_under_upstreams_keys(
    config: Config,
    adapter: Path,
    expected: torch.Tensor,
    network: NetworkConfig,
    base_folder: Path,
    tmp_path: Path,
    suffix: str,
) -> None:
    out = tmp_path / f"merged{suffix}"
    count = export_merged(config, adapter, out)
    merged = Student(load_unet(network, out), load_writenet(network, out))
    torch.testing.assert_close(eps(merged), expected, rtol=1e-4, atol=1e-4)
    before, after = CheckpointFile(base_folder / "base.safetensors"), CheckpointFile(out)
    assert after.shapes == before.shapes and after.dtypes == before.dtypes
    changed = [key for key in before.shapes if not torch.equal(before.read(key), after.read(key))]
    assert len(changed) == count
    assert all(key.endswith("weight") for key in changed)


def test_merging_with_another_base_or_over_it_is_refused(config: Config, adapter: Path, base_folder: Path) -> None:
    with pytest.raises(DataError, match="give another --out"):
        export_merged(config, adapter, base_folder / "base.safetensors")
    card = (adapter / "student.json").read_text()
    (adapter / "student.json").write_text(
        card.replace(fingerprint(base_folder / "base.safetensors", "base"), "f" * 64)
    )
    with pytest.raises(DataError, match="trained on the base ffffffffffff"):
        export_merged(config, adapter, base_folder / "merged.safetensors")
