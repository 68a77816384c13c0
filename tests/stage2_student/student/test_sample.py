from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from common.anytext2.checkpoint import load_unet, load_writenet, write_checkpoint
from common.anytext2.checkpoint_file import CheckpointFile
from common.anytext2.config import NetworkConfig
from common.config import Config
from common.errors import DataError, UsageError
from shards.records.batch import collate
from stage2_student.student.adapter import Card, find_adapter, read_card, save_adapter
from stage2_student.student.lora import adapted_layers
from stage2_student.student.sample import LoadedStudent, decode, draw_noise, load_decoder
from stage2_student.student.student import Student, add_adapters, load_base
from stage2_student.train import train
from tests.stage2_student.conftest import Configure, make_record, stack

SHAPE = (6, 8, 8)
SD15 = {"beta_start": 0.00085, "beta_end": 0.0120, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.fixture(scope="module")
def records():  # type: ignore[no-untyped-def]
    return [make_record(index) for index in range(3)]


@pytest.fixture
def config(configure: Configure) -> Config:
    return configure()


@pytest.fixture
def adapter(config: Config, network: NetworkConfig, base_folder: Path, tmp_path: Path) -> Path:
    """A stored adapter of random weights, for two DDIM steps."""
    from common.anytext2.fingerprint import fingerprint

    checkpoint = base_folder / "base.safetensors"
    student = Student(load_unet(network, checkpoint), load_writenet(network, checkpoint))
    add_adapters(student, config)
    generator = torch.Generator().manual_seed(0)
    tensors = {n: 0.1 * torch.randn(p.shape, generator=generator) for n, p in student.trainable().items()}
    card = Card(
        objective="phased",
        sampler="ddim",
        timesteps=(999, 499),
        step=7,
        rank=4,
        alpha=4.0,
        base_fingerprint=fingerprint(checkpoint, "base"),
        set_hash="0" * 64,
        config=config.as_dict(),
    )
    save_adapter(tmp_path / "adapter", tensors, card)
    return tmp_path / "adapter"


def test_a_samplers_adapters_are_merged_and_count(config: Config, adapter: Path, base_folder: Path) -> None:
    student = LoadedStudent.load(config, adapter).student
    assert not adapted_layers(student.unet) and not adapted_layers(student.writenet)
    base, _ = load_base(config, torch.float32, "cpu")
    assert student.unet.state_dict().keys() == base.unet.state_dict().keys()
    changed = [
        not torch.equal(a, b) for a, b in zip(student.unet.parameters(), base.unet.parameters(), strict=True)
    ]
    assert any(changed)


def test_a_student_samples_exactly_as_diffusers_own_ddim_scheduler_does(
    config: Config,
    adapter: Path,
    records: list,  # type: ignore[type-arg]
) -> None:
    sampler = LoadedStudent.load(config, adapter)
    conditioning = stack(records)
    noise = sampler.noise(0, [0, 1, 2], SHAPE)
    assert noise.shape == (3, 1, *SHAPE)
    scheduler = DDIMScheduler(**SD15, timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.set_timesteps(2)
    z = noise[:, 0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = sampler.student(z, t.expand(3), conditioning.to("cpu", torch.float32))
            z = scheduler.step(eps, t, z).prev_sample
    torch.testing.assert_close(sampler.latents(conditioning, noise), z, rtol=1e-4, atol=1e-4)


def test_an_lcm_student_samples_exactly_as_diffusers_own_lcm_scheduler_does(
    config: Config,
    adapter: Path,
    records: list,  # type: ignore[type-arg]
) -> None:
    sampler = LoadedStudent.load(config, adapter)
    sampler = replace(sampler, card=replace(sampler.card, sampler="lcm", timesteps=(999, 759, 279)))
    conditioning = stack(records)
    generator = torch.Generator().manual_seed(3)
    noise = torch.stack([torch.randn(3, *SHAPE, generator=generator) for _ in range(3)], dim=1)
    scheduler = LCMScheduler(**SD15)
    scheduler.set_timesteps(timesteps=[999, 759, 279])
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(3, *SHAPE, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = sampler.student(z, t.expand(3), conditioning.to("cpu", torch.float32))
            z = scheduler.step(eps, t, z, generator=generator).prev_sample
    torch.testing.assert_close(sampler.latents(conditioning, noise), z, rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_its_neighbours(config: Config, adapter: Path, records: list) -> None:  # type: ignore[type-arg]
    sampler = LoadedStudent.load(config, adapter)
    assert len({record.image_context.shape for record in records}) == 2  # captions of one and of two chunks
    together = sampler.latents(stack(records), sampler.noise(5, [0, 1, 2], SHAPE))
    for number, record in enumerate(records):
        alone = sampler.latents(stack([record]), sampler.noise(5, [number], SHAPE))
        torch.testing.assert_close(together[number], alone[0], rtol=1e-4, atol=1e-4)


def test_records_and_collated_batches_give_the_same_conditioning(records: list) -> None:  # type: ignore[type-arg]
    a, b = stack(records), collate(records).conditioning
    assert a.context_mask is not None and b.context_mask is not None
    assert torch.equal(a.image_context, b.image_context) and torch.equal(a.context_mask, b.context_mask)
    assert torch.equal(a.hints.positions, b.hints.positions) and torch.equal(a.text_context, b.text_context)


def test_the_noise_of_an_image_depends_on_seed_and_number_alone() -> None:
    assert torch.equal(draw_noise(1, 2, SHAPE, 4)[:1], draw_noise(1, 2, SHAPE))
    assert not torch.equal(draw_noise(1, 2, SHAPE), draw_noise(1, 3, SHAPE))
    assert not torch.equal(draw_noise(1, 2, SHAPE), draw_noise(2, 2, SHAPE))


def test_another_number_of_steps_is_refused_with_the_remedy(config: Config, adapter: Path) -> None:
    LoadedStudent.load(config, adapter, steps=2)
    with pytest.raises(UsageError, match=r"trained for 2 steps .* received 4; .*train\.num_phases = 4"):
        LoadedStudent.load(config, adapter, steps=4)


def test_an_adapter_of_another_base_is_refused(
    configure: Configure, adapter: Path, base_folder: Path, tmp_path: Path
) -> None:
    file = CheckpointFile(base_folder / "base.safetensors")
    tensors = {key: file.read(key) for key in file.shapes}
    tensors["model.diffusion_model.out.2.bias"] += 1
    write_checkpoint(tmp_path / "other.safetensors", tensors)
    other = configure()
    other = other.replace(model=other.model.replace(checkpoint=str(tmp_path / "other.safetensors")))
    with pytest.raises(DataError, match=r"trained on the base .* received the base"):
        LoadedStudent.load(other, adapter)


def test_the_newest_checkpoint_of_a_run_is_sampled_and_its_average_preferred(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    result = train(configure(max_steps=2, checkpoint_every=1, ema_decay=0.9), shards=shards, run=tmp_path / "run")
    assert result.checkpoint is not None
    assert find_adapter(tmp_path / "run") == result.checkpoint / "ema"
    assert find_adapter(result.checkpoint) == result.checkpoint / "ema"
    assert find_adapter(result.checkpoint / "lora") == result.checkpoint / "lora"
    assert read_card(find_adapter(tmp_path / "run" / "checkpoints" / "step-00000001")).step == 1
    sampler = LoadedStudent.load(configure(), tmp_path / "run")
    latents = sampler.latents(stack([make_record(0)]), sampler.noise(0, [0], SHAPE))
    assert bool(torch.isfinite(latents).all())


def test_a_folder_without_an_adapter_is_an_error(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(DataError, match="no adapter there"):
        find_adapter(tmp_path / "nothing")
    (adapter / "student.json").write_text("{}")
    with pytest.raises(DataError, match="not an adapter's card"):
        read_card(adapter)


def test_latents_are_decoded_to_pictures(config: Config) -> None:
    pictures = decode(load_decoder(config), torch.randn(2, *SHAPE))
    assert [(picture.shape, picture.dtype) for picture in pictures] == [((32, 32, 3), np.uint8)] * 2
