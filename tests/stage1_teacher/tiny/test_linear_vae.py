from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_teacher.tiny.linear_vae import LinearEncoder, PatchBasis, fit_patch_basis, set_decoder, set_encoder
from stage1_teacher.tiny.networks import build_vae
from stage1_teacher.tiny.train_vae import draw_images, to_unit


@pytest.fixture(scope="module")
def images() -> Tensor:
    return to_unit(draw_images(5, 40))


@pytest.fixture(scope="module")
def basis(images: Tensor) -> PatchBasis:
    return fit_patch_basis(images, 4, 16)


@pytest.fixture(scope="module")
def vae(images: Tensor, basis: PatchBasis) -> Any:
    torch.manual_seed(0)
    vae = build_vae()
    set_encoder(vae, basis)
    set_decoder(vae, basis, images)
    return vae.requires_grad_(False)


def test_latents_of_a_basis_have_unit_mean_square_and_decode_to_nearly_the_patches(
    images: Tensor, basis: PatchBasis
) -> None:
    latents = basis.latents(images)  # (40, 16, 24, 24)
    assert float(latents.square().mean()) == pytest.approx(1, rel=0.05)
    patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)  # (40, 576, 48)
    decoded = latents.flatten(2).transpose(1, 2) @ basis.decode.T + basis.mean
    explained = 1 - (decoded - patches).square().mean() / (patches - patches.mean((0, 1))).square().mean()
    assert float(explained) > 0.98


def test_the_encoder_computes_the_basis_latents(images: Tensor, basis: PatchBasis, vae: Any) -> None:
    mode = vae.encode(images).latent_dist.mode()
    assert float((mode - basis.latents(images)).abs().max()) < 0.1


def test_the_encoder_is_one_convolution(images: Tensor, vae: Any) -> None:
    error = LinearEncoder(vae, 4)(images) - vae.encode(images).latent_dist.mode()
    assert float(error.square().mean().sqrt()) < 3e-3


def test_rounding_the_encoder_to_float16_changes_nothing(images: Tensor, vae: Any) -> None:
    rounded = build_vae()
    rounded.load_state_dict({name: value.half().float() for name, value in vae.state_dict().items()})
    with torch.no_grad():
        other = rounded.encode(images[:4]).latent_dist.mode()
    assert float((other - vae.encode(images[:4]).latent_dist.mode()).abs().max()) < 2e-3


def test_the_decoder_starts_close_to_the_picture(images: Tensor, basis: PatchBasis, vae: Any) -> None:
    decoded = vae.decode(basis.latents(images[:8])).sample
    torch.manual_seed(0)
    blind = build_vae().requires_grad_(False).decode(basis.latents(images[:8])).sample
    error, blind_error = ((x - images[:8]).abs().mean() for x in (decoded, blind))
    assert float(error) < 0.2 < 2 * float(error) < float(blind_error)
