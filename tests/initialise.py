"""Initial weights of a network that is trained from scratch."""

from __future__ import annotations

from diffusers import ControlNetModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from common.anytext2.modules import AttnXBlock
from common.anytext2.unet import UNet
from common.anytext2.writenet import WriteNet


def zero_output_layers(module: UNet | WriteNet) -> None:
    """Zero the last layer of each residual branch, as latent diffusion models start.

    Every block then begins as the identity: second convolutions of residual blocks, `proj_out` of transformers,
    AttnX's outputs, the UNet's last convolution, and WriteNet's hint and residual convolutions. All of them get
    gradients from the first step, what lies behind them from the second.
    """
    layers: list[nn.Module] = []
    for part in module.modules():
        if isinstance(part, ResnetBlock2D):
            layers.append(part.conv2)
        elif isinstance(part, Transformer2DModel):
            layers.append(part.proj_out)
        elif isinstance(part, AttnXBlock) and part.attn1x is not None and part.attn2x is not None:
            layers += [part.attn1x.to_out[0], part.attn2x.to_out[0]]
    if isinstance(module, ControlNetModel):
        layers += [*module.controlnet_down_blocks, module.controlnet_mid_block]
        layers.append(module.controlnet_cond_embedding.fuse_block)
    else:
        layers.append(module.conv_out)
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
