"""The autoencoder between images and latents, from diffusers."""

from __future__ import annotations

from diffusers import AutoencoderKL
from torch import Tensor, nn

from common.anytext2.config import NetworkConfig


class VAE(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, C, H / stride, W / stride) and back."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build the autoencoder with PyTorch's initial weights."""
        super().__init__()
        sizes = config.vae
        levels = len(sizes.channel_mult)
        self.scale_factor = config.scale_factor
        self.autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(sizes.channels * mult for mult in sizes.channel_mult),
            layers_per_block=sizes.num_res_blocks,
            norm_num_groups=sizes.norm_groups,
            latent_channels=sizes.latent_channels,
            scaling_factor=config.scale_factor,
        )

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the posterior, each (B, C, h, w), not scaled."""
        posterior = self.autoencoder.encode(images).latent_dist
        return posterior.mean, posterior.logvar

    def encode(self, images: Tensor) -> Tensor:
        """Return the posterior's mode times scale_factor, (B, C, h, w); upstream samples instead."""
        return self.scale_factor * self.moments(images)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Return images, (B, 3, H, W), about [-1, 1] and not clipped."""
        images: Tensor = self.autoencoder.decode(latents / self.scale_factor).sample
        return images
