from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from common.anytext2.conditioning import ConditioningBatch, Hints
from common.config import Config, LoraConfig, TrainConfig
from common.errors import DataError, UsageError
from stage2_student.student.lora import (
    adapt,
    attach,
    find_targets,
    load_lora,
    lora_parameters,
    save_lora,
    summarise,
)
from stage2_student.student.student import Student, add_adapters

CONFIG = Config(lora=LoraConfig(rank=4, alpha=4.0, writenet=True))


def conditioning(batch: int = 2) -> ConditioningBatch:
    generator = torch.Generator().manual_seed(0)
    return ConditioningBatch(
        image_context=torch.randn(batch, 77, 16, generator=generator),
        context_mask=None,
        text_context=torch.randn(batch, 77, 16, generator=generator),
        hints=Hints(
            glyphs=(torch.rand(batch, 1, 32, 32, generator=generator) > 0.7).float(),
            positions=(torch.rand(batch, 1, 32, 32, generator=generator) > 0.5).float(),
            masked_latents=torch.randn(batch, 6, 8, 8, generator=generator),
        ),
    )


def eps(student: Student) -> torch.Tensor:
    z = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    return student(z, torch.tensor([999, 249]), conditioning())


def test_the_default_patterns_adapt_attention_attnx_feed_forward_projections_and_convolutions(
    student: Student,
) -> None:
    adapted = add_adapters(student, CONFIG)
    unet = {a.name: a for a in adapted if a.part == "unet"}
    block = "mid_block.attentions.0.transformer_blocks.0."
    for name in ("attn1.to_q", "attn2.to_k", "attn1x.to_v", "attn2x.to_out.0", "ff.net.0.proj", "ff.net.2"):
        assert unet[block + name].kind == "Linear"
    for name in ("down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.proj_in"):
        assert unet[name].kind == "Conv2d"
    assert "down_blocks.0.resnets.0.time_emb_proj" in unet
    writenet = {a.name for a in adapted if a.part == "writenet"}
    zero_convolutions = {n for n in writenet if n.startswith("controlnet_")}
    assert len(zero_convolutions) == len(student.writenet.controlnet_down_blocks) + 1
    assert len({(a.part, a.name) for a in adapted}) == len(adapted)
    assert sum(a.parameters for a in adapted) == sum(p.numel() for p in student.parameters() if p.requires_grad)


def test_the_summary_counts_every_module_and_parameter(student: Student) -> None:
    adapted = add_adapters(student, CONFIG)
    lines = summarise(adapted)
    assert f"{len(adapted)} modules, {sum(a.parameters for a in adapted):,} trainable" in lines[-1]
    assert sum(int(line.split(" modules")[0].split()[-1]) for line in lines[:-1]) == len(adapted)


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_one(student: Student) -> None:
    with pytest.raises(UsageError, match=r"lora\.targets: pattern 'to_querry' matches no .* 'to_q'"):
        find_targets(student.unet, ["to_k", "to_querry"], "lora.targets")


def test_a_module_matched_by_two_patterns_is_refused(student: Student) -> None:
    with pytest.raises(UsageError, match=r"attn1\.to_q is matched by both 'to_q' and 'attn1\.to_q'"):
        find_targets(student.unet, ["to_q", "attn1.to_q"], "lora.targets")


def test_patterns_match_whole_name_parts_and_a_star_stands_for_one() -> None:
    model = nn.ModuleDict(
        {
            "zero": nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]),
            "my_to_q": nn.Linear(1, 1),
            "to_q": nn.Linear(1, 1),
        }
    )
    assert list(find_targets(model, ["zero.*", "to_q"], "x")) == ["zero.0", "zero.1", "to_q"]
    with pytest.raises(UsageError, match="matches no"):
        find_targets(model, ["*.zero.*"], "x")


def test_a_fresh_adapter_leaves_the_output_unchanged_bit_for_bit(student: Student) -> None:
    before = eps(student)
    add_adapters(student, CONFIG)
    torch.testing.assert_close(eps(student), before, rtol=0, atol=0)


def test_initial_adapters_depend_on_the_seed_and_the_module_alone(student: Student, network, base_folder) -> None:  # type: ignore[no-untyped-def]
    from common.anytext2.checkpoint import load_unet

    targets = find_targets(student.unet, ["to_q", "conv1"], "x")
    adapt(student.unet, "unet", targets, rank=4, alpha=4.0, seed=3)
    torch.manual_seed(12345)
    other = load_unet(network, base_folder / "base.safetensors")
    fewer = find_targets(other, ["to_q"], "x")
    adapt(other, "unet", fewer, rank=4, alpha=4.0, seed=3)
    mine, theirs = lora_parameters(student.unet), lora_parameters(other)
    assert set(theirs) < set(mine)
    for name, parameter in theirs.items():
        torch.testing.assert_close(parameter, mine[name], rtol=0, atol=0)


def test_after_two_steps_every_parameter_has_had_a_gradient_and_the_base_is_bit_identical(
    student: Student,
) -> None:
    base = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    add_adapters(student, CONFIG)
    parameters = student.trainable()
    assert any(name.startswith("unet.down_blocks.0.resnets.0.") for name in parameters)
    assert any(name.startswith("writenet.controlnet_mid_block.") for name in parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    had_gradient: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        eps(student).square().mean().backward()
        had_gradient |= {name for name, p in parameters.items() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
    assert had_gradient == set(parameters)
    after = {
        name.replace(".base_layer.", "."): t for name, t in student.state_dict().items() if ".lora_" not in name
    }
    assert set(after) == set(base)
    for name, tensor in base.items():
        assert torch.equal(after[name], tensor), name


def test_adapters_are_float32_on_a_half_precision_base(student: Student) -> None:
    student.bfloat16()
    add_adapters(student, CONFIG)
    assert {p.dtype for p in student.trainable().values()} == {torch.float32}
    c = conditioning().to("cpu", torch.bfloat16)
    out = student(torch.randn(2, 6, 8, 8), torch.tensor([999, 249]), c)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    gradients = [p.grad for n, p in student.trainable().items() if ".lora_B." in n]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


def perturbed(student: Student) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    for parameter in student.trainable().values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return {name: p.detach().clone() for name, p in lora_parameters(student.unet).items()}


def test_a_saved_adapter_comes_back_and_gives_the_same_output(
    student: Student,
    network,
    base_folder: Path,
    tmp_path: Path,  # type: ignore[no-untyped-def]
) -> None:
    from common.anytext2.checkpoint import load_unet

    add_adapters(student, Config(lora=LoraConfig(rank=4, alpha=8.0), train=TrainConfig(seed=9)))
    save_lora(tmp_path / "unet", perturbed(student), rank=4, alpha=8.0)
    expected = eps(student)
    tensors, rank, alpha = load_lora(tmp_path / "unet")
    assert (rank, alpha) == (4, 8.0)
    student.unet = load_unet(network, base_folder / "base.safetensors")
    attach(student.unet, "unet", tensors, rank=rank, alpha=alpha)
    torch.testing.assert_close(eps(student), expected, rtol=0, atol=0)


def test_peft_itself_loads_a_saved_adapter(student: Student, network, base_folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from common.anytext2.checkpoint import load_unet

    add_adapters(student, Config(lora=LoraConfig(rank=4, alpha=8.0)))
    save_lora(tmp_path / "unet", perturbed(student), rank=4, alpha=8.0)
    expected = eps(student)
    loaded = PeftModel.from_pretrained(
        load_unet(network, base_folder / "base.safetensors"), str(tmp_path / "unet")
    )
    student.unet = loaded.base_model.model
    torch.testing.assert_close(eps(student), expected, rtol=0, atol=0)


def test_an_adapter_of_another_network_is_refused(student: Student) -> None:
    tensors = {
        "mid_block.nothing.lora_A.weight": torch.zeros(4, 4),
        "mid_block.nothing.lora_B.weight": torch.zeros(4, 4),
    }
    with pytest.raises(DataError, match=r"unet has no module mid_block\.nothing"):
        attach(student.unet, "unet", tensors, rank=4, alpha=4.0)


def test_a_damaged_adapter_file_is_an_error_that_names_it(student: Student, tmp_path: Path) -> None:
    add_adapters(student, Config(lora=LoraConfig(rank=4)))
    save_lora(tmp_path / "unet", perturbed(student), rank=4, alpha=8.0)
    weights = tmp_path / "unet" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"adapter_model\.safetensors|unreadable"):
        load_lora(tmp_path / "unet")
    weights.unlink()
    with pytest.raises(DataError, match=r"adapter_model\.safetensors is missing"):
        load_lora(tmp_path / "unet")
