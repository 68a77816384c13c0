"""Set a VAE's weights so that it starts as a good linear autoencoder, by closed forms.

Trained from a random start, a small AutoencoderKL on a CPU is unreadable after hours: group normalisation hides
the colour of a flat picture, and 16 values a patch must be invented by gradient descent. Both have closed forms:

- the encoder becomes exactly the principal components of patches, turned into the latents' scale. Its residual
  branches are zero; what normalisation takes away is kept by two constant channels, +K and -K, that fix its scale;
- the decoder's upsampling convolutions become the least-squares fit of the finer picture; residual branches start
  at zero and learn what a linear decoder cannot do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ENCODER_CONSTANT = 64.0
DECODER_CONSTANT = 4.0
SILU_SHIFT = 8.0
"""silu(x) is x to 0.3 % from here on."""
SIGNAL_SCALE = 0.25
"""Keeps the encoder's signal within about 1 of `SILU_SHIFT`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchBasis:
    """Principal components of an image's patches, scaled to be latents."""

    encode: Tensor
    """(z, 3 p p) float32: latents = encode @ (patch - mean)."""
    decode: Tensor
    """(3 p p, z): the way back."""
    mean: Tensor
    """(3 p p,)."""
    patch: int
    """p: side of a patch, pixels; the VAE's stride."""

    def latents(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to (B, z, H/p, W/p)."""
        kernel = self.encode.reshape(-1, 3, self.patch, self.patch)
        return functional.conv2d(images, kernel, -(self.encode @ self.mean), stride=self.patch)


class LinearEncoder:
    """What an encoder made by `set_encoder` computes, as the one convolution that it amounts to.

    It is a hundred times cheaper, and within 1e-3 (rms) of it.
    """

    @torch.no_grad()
    def __init__(self, vae: Any, stride: int) -> None:
        """Fit the convolution to what the encoder makes of noise at all contrasts."""
        g = torch.Generator().manual_seed(0)
        images = torch.rand(4, 3, 128, 128, generator=g) * 2 - 1
        images = images * torch.rand(4, 1, 1, 1, generator=g) + torch.rand(4, 3, 1, 1, generator=g) * 2 - 1
        images = images.clamp(-1, 1)
        latents = vae.encode(images).latent_dist.mode()  # (4, z, h, w)
        patches = functional.unfold(images, stride, stride=stride).transpose(1, 2).flatten(0, 1)
        ones = torch.ones(len(patches), 1)
        target = latents.flatten(2).transpose(1, 2).flatten(0, 1)
        fit = torch.linalg.lstsq(torch.cat([patches, ones], dim=1).double(), target.double()).solution.float()
        self._kernel = fit[:-1].T.reshape(-1, 3, stride, stride).contiguous()
        self._bias, self._stride = fit[-1], stride

    def __call__(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to latents (B, z, h, w)."""
        return functional.conv2d(images, self._kernel, self._bias, stride=self._stride)


def fit_patch_basis(images: Tensor, patch: int, channels: int, *, evenness: float = 0.25) -> PatchBasis:
    """Fit principal components of patches.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        patch: side of a patch, pixels.
        channels: components kept.
        evenness: exponent of the variance that is divided out: 0.5 whitens, 0 leaves as it is. In between, fine
            detail counts in the denoiser's loss without drowning the colours.

    Returns:
        A basis whose latents have unit mean square over all channels.
    """
    values = functional.unfold(images, patch, stride=patch).transpose(1, 2).reshape(-1, 3 * patch * patch)
    mean = values.mean(0)
    variances, vectors = torch.linalg.eigh(torch.cov((values - mean).T.double()))
    variances, vectors = variances.flip(0)[:channels], vectors.flip(1)[:, :channels]
    # An eigenvector's sign is arbitrary: fix it, so that a fit is reproducible.
    vectors = vectors * torch.sign(vectors.sum(0))
    scale = variances**-evenness
    scale = scale / ((variances * scale**2).mean()).sqrt()
    return PatchBasis(
        encode=(vectors * scale).T.float().contiguous(),
        decode=(vectors / scale).float().contiguous(),
        mean=mean,
        patch=patch,
    )


@torch.no_grad()
def set_encoder(vae: Any, basis: PatchBasis) -> None:
    """Make a stride-4 AutoencoderKL's encoder and `quant_conv` compute `basis.latents` as the posterior's mode.

    Args:
        vae: diffusers' AutoencoderKL of three levels with one group in its norms.
        basis: of patches of 4.
    """
    encoder, z = vae.encoder, basis.encode.shape[0]
    _zero_residuals(encoder)
    signs = torch.tensor([1.0, -1.0]) * ENCODER_CONSTANT
    # Space to depth: a 2x2 neighbourhood of 3 channels becomes 12 channels, channel 3 (2 dy + dx) + c.
    _fill(encoder.conv_in, torch.eye(3)[:, :, None, None], signs, at=(1, 1))
    unshuffle = torch.zeros(12, 3, 2, 2)
    for dy in range(2):
        for dx in range(2):
            for c in range(3):
                unshuffle[3 * (2 * dy + dx) + c, c, dy, dx] = 1
    _fill(encoder.down_blocks[0].downsamplers[0].conv, unshuffle, signs, at=(0, 0))
    _fill(encoder.down_blocks[1].resnets[0].conv_shortcut, torch.eye(12)[:, :, None, None], signs, at=(0, 0))
    # A patch's pixel (4 rows, 4 columns) is tap (row // 2, column // 2) of the channel of (row % 2, column % 2).
    kernel = basis.encode.reshape(z, 3, 2, 2, 2, 2)  # (z, c, ty, dy, tx, dx)
    kernel = kernel.permute(0, 3, 5, 1, 2, 4).reshape(z, 12, 2, 2) * SIGNAL_SCALE
    _fill(encoder.down_blocks[1].downsamplers[0].conv, kernel, signs, at=(0, 0))
    _fill(encoder.down_blocks[2].resnets[0].conv_shortcut, torch.eye(z)[:, :, None, None], signs, at=(0, 0))
    # The norm divides by the constants' spread: multiply it back in.
    channels = encoder.conv_norm_out.weight.shape[0]
    encoder.conv_norm_out.weight.fill_(ENCODER_CONSTANT * (2 / channels) ** 0.5)
    encoder.conv_norm_out.bias.fill_(SILU_SHIFT)
    # The constants' own values lie beyond silu's straight part: shrink them to what restores the mean.
    encoder.conv_norm_out.weight[-2:] *= 2**-6
    head = torch.zeros_like(encoder.conv_out.weight)
    head[:z, :z, 1, 1] = torch.eye(z) / SIGNAL_SCALE
    head[:z, -2:, 1, 1] = -(2**6) / (2 * SIGNAL_SCALE)
    encoder.conv_out.weight.copy_(head)
    encoder.conv_out.bias.zero_()
    encoder.conv_out.bias[z:] = -6.0  # log variance: std 0.05
    vae.quant_conv.weight.copy_(torch.eye(2 * z)[:, :, None, None])
    nn.init.zeros_(vae.quant_conv.bias)
    # What is left is a constant a channel: measure it on a grey picture and take it off, in two goes, because the
    # weights are shipped as float16 and a large number's rounding would be a shift of the latents.
    for last in (encoder.conv_out, vae.quant_conv):
        for parameter in [*encoder.parameters(), *vae.quant_conv.parameters()]:
            parameter.copy_(parameter.half())
        found = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode()[0, :, 3, 3]
        last.bias[:z] -= found - basis.latents(torch.zeros(1, 3, 4, 4))[0, :, 0, 0]


@torch.no_grad()
def set_decoder(vae: Any, basis: PatchBasis, images: Tensor) -> None:
    """Make a stride-4 AutoencoderKL's decoder start as the least-squares linear decoder.

    Args:
        vae: as for `set_encoder`.
        basis: of patches of 4.
        images: (N, 3, H, W) in [-1, 1], what the fit is made on.
    """
    decoder, z = vae.decoder, basis.encode.shape[0]
    _zero_residuals(decoder)
    signs = torch.tensor([1.0, -1.0]) * DECODER_CONSTANT
    latents = basis.latents(images)
    vae.post_quant_conv.weight.copy_(torch.eye(z)[:, :, None, None])
    nn.init.zeros_(vae.post_quant_conv.bias)
    _fill(decoder.conv_in, torch.eye(z)[:, :, None, None], signs, at=(1, 1), keep_rest=0.3)
    half = functional.pixel_unshuffle(images, 2)  # (N, 12, H/2, W/2)
    first, bias = _fit_upsampling(latents, half)
    _fill(decoder.up_blocks[0].upsamplers[0].conv, first, signs, at=(0, 0), bias=bias, keep_rest=0.3)
    half = functional.conv2d(functional.interpolate(latents, scale_factor=2.0), first, bias, padding=1)
    shortcut = decoder.up_blocks[1].resnets[0].conv_shortcut
    _fill(shortcut, torch.eye(12)[:, :, None, None], signs, at=(0, 0), keep_rest=0.5)
    second, bias = _fit_upsampling(half, images)
    _fill(decoder.up_blocks[1].upsamplers[0].conv, second, signs, at=(0, 0), bias=bias, keep_rest=0.3)
    shortcut = decoder.up_blocks[2].resnets[0].conv_shortcut
    _fill(shortcut, torch.eye(3)[:, :, None, None], signs, at=(0, 0), keep_rest=0.5)
    channels = decoder.conv_norm_out.weight.shape[0]
    spread = DECODER_CONSTANT * (2 / channels) ** 0.5
    decoder.conv_norm_out.weight.fill_(1.0)
    decoder.conv_norm_out.bias.zero_()
    decoder.conv_norm_out.weight[:3] = spread
    decoder.conv_norm_out.bias[:3] = SILU_SHIFT / 2
    decoder.conv_out.weight.mul_(0.05)
    decoder.conv_out.weight[:, :3] = 0
    decoder.conv_out.weight[:, :3, 1, 1] = torch.eye(3)
    decoder.conv_out.bias.fill_(-SILU_SHIFT / 2)


def _fit_upsampling(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares for target = conv3x3(nearest x 2 of source): kernel (out, in, 3, 3) and bias (out,)."""
    large = functional.interpolate(source, scale_factor=2.0)
    columns = functional.unfold(large, 3, padding=1).transpose(1, 2).flatten(0, 1).double()  # (N H W, 9 in)
    columns = torch.cat([columns, torch.ones(len(columns), 1, dtype=columns.dtype)], dim=1)
    values = target.flatten(2).transpose(1, 2).flatten(0, 1).double()
    gram = columns.T @ columns
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, columns.T @ values).float()  # (9 in + 1, out)
    return solution[:-1].T.reshape(target.shape[1], source.shape[1], 3, 3), solution[-1]


def _zero_residuals(module: nn.Module) -> None:
    """Let every residual branch and attention add nothing at the start."""
    for name, part in module.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            nn.init.zeros_(part.weight)  # type: ignore[arg-type]
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]


def _fill(
    conv: nn.Conv2d,
    kernel: Tensor,
    constants: Tensor,
    *,
    at: tuple[int, int],
    bias: Tensor | None = None,
    keep_rest: float = 0.0,
) -> None:
    """Put a kernel into a convolution's first channels, and the constants into the last two.

    Args:
        conv: whose weights are set.
        kernel: (out, in, kh, kw), no larger than the convolution's.
        constants: (2,) the last two channels' values.
        at: tap (row, column) of the kernel's top left.
        bias: (out,) of the first channels; zero if None.
        keep_rest: factor on the random weights of the other output channels; 0 clears them.
    """
    out, into, kh, kw = kernel.shape
    weight = conv.weight
    weight.mul_(keep_rest)
    assert conv.bias is not None
    conv.bias.mul_(keep_rest)
    weight[:out] = 0
    weight[-2:] = 0
    weight[:out, :into, at[0] : at[0] + kh, at[1] : at[1] + kw] = kernel
    conv.bias[:out] = 0 if bias is None else bias
    conv.bias[-2:] = constants
