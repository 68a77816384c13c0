from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from common.anytext2.checkpoint import load_unet, load_vae, load_writenet
from common.anytext2.conditioning import Hints, pad_contexts
from common.anytext2.config import NetworkConfig, VaeConfig
from common.anytext2.modules import AttnXBlock
from common.anytext2.unet import UNet
from common.anytext2.writenet import WriteNet
from tests.initialise import zero_output_layers
from tests.small_network import SMALL, base_checkpoint


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_hints(batch: int, config: NetworkConfig = SMALL, size: int = 32) -> Hints:
    latent = size // config.stride
    return Hints(
        glyphs=(random(batch, 1, size, size, seed=1) > 1).float(),
        positions=(random(batch, 1, size, size, seed=2) > 0).float(),
        masked_latents=random(batch, config.latent_channels, latent, latent, seed=3),
    )


@pytest.fixture(scope="module")
def unet() -> UNet:
    return load_unet(SMALL, base_checkpoint())


@pytest.fixture(scope="module")
def writenet() -> WriteNet:
    return load_writenet(SMALL, base_checkpoint())


def tensors_of(module: nn.Module) -> dict[str, int]:
    """List every tensor that hangs anywhere on a module, in a dict, list or attribute too."""
    found = {}
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            for index, item in enumerate(values):
                if isinstance(item, Tensor):
                    found[f"{name}.{attribute}.{index}"] = id(item)
    return found


def test_a_samples_noise_does_not_depend_on_its_neighbours_captions(unet: UNet) -> None:
    contexts = [random(77 * k, 32, seed=k) for k in (1, 3, 2)]
    z, t = random(3, 6, 8, 8), torch.tensor([999, 500, 1])
    context, mask = pad_contexts(contexts)
    together = unet(z, t, context, context_mask=mask)
    for row, own in enumerate(contexts):
        alone = unet(z[row : row + 1], t[row : row + 1], own[None])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)
    unmasked = unet(z, t, context)
    assert float((unmasked[0] - together[0]).norm() / together[0].norm()) > 0.01  # the mask matters


def test_what_stands_in_padding_does_not_matter(unet: UNet) -> None:
    context, mask = pad_contexts([random(77, 32), random(154, 32, seed=1)])
    z, t = random(2, 6, 8, 8), torch.tensor([7, 7])
    assert mask is not None
    other = torch.where(mask[..., None], context, 100.0)
    torch.testing.assert_close(
        unet(z, t, context, context_mask=mask), unet(z, t, other, context_mask=mask), rtol=1e-6, atol=1e-6
    )


def test_contexts_of_one_length_need_no_mask() -> None:
    context, mask = pad_contexts([random(77, 32), random(77, 32)])
    assert context.shape == (2, 77, 32)
    assert mask is None


def test_attnx_is_scaled_by_its_argument(unet: UNet) -> None:
    given = (random(1, 6, 8, 8), torch.tensor([10]), random(1, 77, 32))
    full, half, none = (unet(*given, attnx_scale=scale) for scale in (1.0, 0.5, 0.0))
    assert not torch.allclose(full, half)
    assert torch.equal(full, unet(*given))
    without = load_unet(SMALL, base_checkpoint())
    for block in without.modules():
        if isinstance(block, AttnXBlock):
            block.attn1x = block.attn2x = None
    torch.testing.assert_close(none, without(*given))


def test_calls_in_any_order_give_the_same_numbers_and_leave_no_tensor_behind(
    unet: UNet, writenet: WriteNet
) -> None:
    parts: tuple[nn.Module, ...] = (unet, writenet)
    before = [tensors_of(part) for part in parts]
    hints, text = make_hints(2), random(2, 77, 32)
    control = writenet(hints, text)
    given = (random(2, 6, 8, 8), torch.tensor([3, 800]), random(2, 154, 32, seed=5))
    first = unet(*given, control)
    with torch.enable_grad():
        unet(*given, writenet(make_hints(2), random(2, 77, 32, seed=9).requires_grad_())).sum().backward()
    unet(given[0] * 2, given[1], given[2])
    again = writenet(hints, text)
    assert all(torch.equal(a, b) for a, b in zip(control, again, strict=True))
    assert torch.equal(first, unet(*given, again))
    assert [tensors_of(part) for part in parts] == before


def test_every_parameter_gets_a_gradient_input_blocks_and_hint_blocks_included() -> None:
    torch.manual_seed(0)
    unet, writenet = load_unet(SMALL, base_checkpoint()), load_writenet(SMALL, base_checkpoint())
    for part in (unet, writenet):
        part.requires_grad_(True)
    control = writenet(make_hints(2), random(2, 77, 32))
    unet(random(2, 6, 8, 8), torch.tensor([5, 900]), random(2, 77, 32), control).square().mean().backward()
    # conv_in's weight sees zero latents (fast_control) and has no gradient by construction.
    for part, allowed in ((unet, set()), (writenet, {"conv_in.weight"})):
        dead = {n for n, p in part.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)}
        assert dead == allowed


def test_gradient_checkpointing_changes_no_gradient() -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        unet = load_unet(SMALL, base_checkpoint()).requires_grad_(True).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        context, mask = pad_contexts([random(77, 32), random(154, 32)])
        eps = unet(random(2, 6, 8, 8), torch.tensor([5, 900]), context, context_mask=mask, attnx_scale=0.7)
        return list(torch.autograd.grad(eps.square().mean(), list(unet.parameters())))

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_peft_adapts_the_unet_by_diffusers_names_and_starts_as_the_same_function(unet: UNet) -> None:
    given = (random(1, 6, 8, 8), torch.tensor([10]), random(1, 77, 32))
    expected = unet(*given)
    adapted = get_peft_model(
        load_unet(SMALL, base_checkpoint()), LoraConfig(r=2, target_modules=["to_q", "conv1"])
    )
    torch.testing.assert_close(adapted(*given, attnx_scale=1.0), expected)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    stem = "base_model.model.up_blocks.0.attentions.0.transformer_blocks.0."
    assert f"{stem}attn1x.to_q.lora_A.default.weight" in names
    assert "base_model.model.down_blocks.0.resnets.0.conv1.lora_B.default.weight" in names


@pytest.mark.parametrize(("levels", "channels"), [((1, 2), 16), ((1, 2, 2), 4), ((1, 1, 2, 2), 8)])
def test_hints_follow_the_vaes_stride_and_channels(levels: tuple[int, ...], channels: int) -> None:
    vae = VaeConfig(channels=8, norm_groups=4, channel_mult=levels, num_res_blocks=1, latent_channels=channels)
    config = NetworkConfig(unet=SMALL.unet, writenet=SMALL.writenet, vae=vae, clip=SMALL.clip)
    network = load_vae(config, base_checkpoint(config))
    images = random(1, 3, 32, 32)
    latents = network.encode(images)
    assert latents.shape == (1, channels, 32 // config.stride, 32 // config.stride)
    assert network.decode(latents).shape == images.shape
    control = load_writenet(config, base_checkpoint(config))(make_hints(1, config), random(1, 77, 32))
    unet = load_unet(config, base_checkpoint(config))
    assert unet(latents, torch.tensor([1]), random(1, 77, 32), control).shape == latents.shape


def test_the_vae_scales_latents_by_its_factor() -> None:
    network = load_vae(SMALL, base_checkpoint())
    images = random(1, 3, 32, 32)
    torch.testing.assert_close(network.encode(images), 0.18215 * network.moments(images)[0])


def test_zeroed_output_layers_start_silent_and_learn() -> None:
    torch.manual_seed(0)
    unet, writenet = UNet(SMALL), WriteNet(SMALL)
    zero_output_layers(unet)
    zero_output_layers(writenet)
    control = writenet(make_hints(1), random(1, 77, 32))
    eps = unet(random(1, 6, 8, 8), torch.tensor([1]), random(1, 77, 32), control)
    assert not bool(eps.any())
    assert not any(bool(residual.any()) for residual in control)
    (eps - 1).square().mean().backward()
    assert bool(unet.conv_out.weight.grad.abs().max() > 0)


def test_the_network_definition_loads_no_text_encoder_and_no_ocr() -> None:
    code = (
        "import sys, common.anytext2.checkpoint, common.anytext2.fingerprint\n"
        "names = ('transformers.models.clip', 'onnxruntime', 'cv2', 'stage1_teacher', 'rapidocr_onnxruntime')\n"
        "print([m for m in sys.modules if m.startswith(names)])"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
