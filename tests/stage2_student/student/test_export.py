from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from common.anytext2.checkpoint import load_unet, load_writenet
from common.anytext2.checkpoint_file import CheckpointFile
from common.anytext2.config import NetworkConfig
from common.anytext2.fingerprint import fingerprint
from common.anytext2.unet import UNet
from common.config import Config
from common.errors import DataError, UsageError
from stage2_student.student.adapter import Card, find_adapter, read_card, save_adapter
from stage2_student.student.export import export, export_diffusers, export_kohya, export_merged
from stage2_student.student.sample import LoadedStudent
from stage2_student.student.student import Student, add_adapters, load_base
from tests.stage2_student.conftest import Configure, make_record, stack

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")


@pytest.fixture
def config(configure: Configure) -> Config:
    zero = ("controlnet_down_blocks.*", "controlnet_mid_block", "to_q")
    return configure(
        lora={"targets": ATTENTION + CONVOLUTIONS, "alpha": 2.0, "writenet": True, "writenet_targets": zero}
    )


def random_adapter(config: Config) -> dict[str, torch.Tensor]:
    base, _ = load_base(config, torch.float32, "cpu")
    add_adapters(base, config)
    generator = torch.Generator().manual_seed(0)
    return {n: 0.05 * torch.randn(p.shape, generator=generator) for n, p in base.trainable().items()}


@pytest.fixture
def adapter(config: Config, base_folder: Path, tmp_path: Path) -> Path:
    """Random weights, alpha half the rank."""
    card = Card(
        objective="phased",
        sampler="ddim",
        timesteps=(999, 499),
        step=7,
        rank=4,
        alpha=2.0,
        base_fingerprint=fingerprint(base_folder / "base.safetensors", "base"),
        set_hash="0" * 64,
        config=config.as_dict(),
    )
    save_adapter(tmp_path / "adapter", random_adapter(config), card)
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
    assert export_diffusers(adapter, out).modules > 40
    before = eps(student)
    state = load_file(out)
    student.unet.load_lora_adapter(state, prefix="unet")
    student.writenet.load_lora_adapter(state, prefix="writenet")
    torch.testing.assert_close(eps(student), expected, rtol=1e-4, atol=1e-4)
    assert float((before - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["diffusers.safetensors", "kohya.safetensors", "merged.safetensors", "m.ckpt"])
def test_every_exported_file_says_how_to_sample_it(
    config: Config, adapter: Path, tmp_path: Path, name: str
) -> None:
    layout = name.split(".")[0] if name != "m.ckpt" else "merged"
    done = export(config, adapter, layout, tmp_path / name)
    assert len(done.files) == (2 if name.startswith("kohya") else 1)
    for path in done.files:
        if path.suffix == ".ckpt":
            metadata = torch.load(path, weights_only=True)["metadata"]
        else:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
        assert metadata["timesteps"] == "[999, 499]" and metadata["num_inference_steps"] == "2"
        assert metadata["guidance_scale"] == "1.0" and metadata["sampler"] == "ddim"
        assert read_card(path) == replace(read_card(adapter), alpha=read_card(path).alpha, config={})


def test_diffusers_reads_the_kohya_file_as_the_same_lora(
    config: Config, adapter: Path, network: NetworkConfig, base_folder: Path, tmp_path: Path
) -> None:
    """By a stock pipeline's own converter and loader, from the file, with every layer of the UNet adapted."""
    every = {name for name, module in UNet(network).named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert any("attn1x" in name for name in every) and any("downsamplers" in name for name in every)
    tensors = random_adapter(config.replace(lora=config.lora.replace(targets=tuple(sorted(every)))))
    save_adapter(tmp_path / "every", tensors, read_card(adapter))
    files = export_kohya(tmp_path / "every", tmp_path / "kohya.safetensors").files
    assert [file.name for file in files] == ["kohya.safetensors", "kohya_writenet.safetensors"]
    assert all(key.startswith("lora_unet_") for key in load_file(files[0]))
    assert all(key.startswith("lora_controlnet_") for key in load_file(files[1]))

    state, alphas = StableDiffusionPipeline.lora_state_dict(str(files[0]))
    assert set(alphas.values()) == {2.0}
    unet = load_unet(network, base_folder / "base.safetensors")
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet)
    found = {name: module for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    assert set(found) == every
    for name, layer in found.items():
        a, b = (tensors[f"unet.{name}.lora_{side}.weight"].flatten(1) for side in "AB")
        delta = layer.get_delta_weight("default_0").flatten(1)
        torch.testing.assert_close(delta, (0.5 * b @ a).view_as(delta), rtol=1e-4, atol=1e-6)


def test_a_stock_unet_takes_all_of_the_kohya_file_but_attnx(
    adapter: Path, network: NetworkConfig, tmp_path: Path
) -> None:
    path = export_kohya(adapter, tmp_path / "kohya.safetensors").files[0]
    modules = {key.split(".")[0] for key in load_file(path)}
    state, alphas = StableDiffusionPipeline.lora_state_dict(str(path))
    stock = UNet2DConditionModel.from_config(dict(UNet(network).config))
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, stock)
    found = [name for name, module in stock.named_modules() if hasattr(module, "lora_A")]
    assert len(found) == len([name for name in modules if "attnx" not in name]) < len(modules)


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "merged"])
def test_an_exported_file_is_sampled_as_the_adapter_is(
    config: Config, adapter: Path, expected: torch.Tensor, tmp_path: Path, layout: str
) -> None:
    path = export(config, adapter, layout, tmp_path / "student.safetensors").files[0]
    assert find_adapter(path) == path
    loaded = LoadedStudent.load(config, path, steps=2)
    torch.testing.assert_close(eps(loaded.student), expected, rtol=1e-4, atol=1e-4)
    assert loaded.card.timesteps == (999, 499) and not loaded.student.adapts_writenet
    if layout == "merged":
        with pytest.raises(DataError, match="received a merged checkpoint"):
            export(config, path, "kohya", tmp_path / "again.safetensors")
    else:  # and from one layout into the other
        again = export(config, path, "diffusers", tmp_path / "again.safetensors").files[0]
        torch.testing.assert_close(eps(LoadedStudent.load(config, again).student), expected, rtol=1e-4, atol=1e-4)


def test_half_an_adapter_is_refused(config: Config, adapter: Path, tmp_path: Path) -> None:
    unet, writenet = export(config, adapter, "kohya", tmp_path / "student.safetensors").files
    with pytest.raises(DataError, match=r"WriteNet's half .* give the file that was exported with it"):
        LoadedStudent.load(config, writenet)
    data = bytearray(writenet.read_bytes())
    data[-1] ^= 1
    writenet.write_bytes(data)
    with pytest.raises(DataError, match="is of another export"):
        LoadedStudent.load(config, unet)
    writenet.unlink()
    with pytest.raises(DataError, match="student_writenet.safetensors beside it"):
        LoadedStudent.load(config, unet)


def test_files_that_export_did_not_write_are_refused(config: Config, base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not say how to sample it .* give the run's folder"):
        LoadedStudent.load(config, base_folder / "base.safetensors")
    for name in ("noise.safetensors", "noise.pt"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(DataError, match=name):
            LoadedStudent.load(config, tmp_path / name)


@pytest.mark.parametrize(
    ("layout", "name"), [("diffusers", "x.pt"), ("kohya", "x"), ("merged", "x.pt"), ("diffusers", "x.ckpt")]
)
def test_a_name_that_says_another_format_is_refused(
    config: Config, adapter: Path, tmp_path: Path, layout: str, name: str
) -> None:
    with pytest.raises(UsageError, match=r"expected \.safetensors"):
        export(config, adapter, layout, tmp_path / name)
    assert not (tmp_path / name).exists()


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
    count = export_merged(config, adapter, out).modules
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
