"""A network of a few hundred thousand weights, filled by the golden rule, for tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from common.anytext2.config import ClipConfig, NetworkConfig, UNetConfig, VaeConfig, WriteNetConfig
from tests.golden_rule import RuleCheckpoint

TOKENIZER_FOLDER = Path(__file__).parent.parent / "models" / "tiny" / "clip"

SMALL = NetworkConfig(
    unet=UNetConfig(
        model_channels=16,
        norm_groups=4,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        num_heads=2,
        attnx_levels=(1,),
    ),
    writenet=WriteNetConfig(glyph_widths=(4, 8, 8, 16), position_widths=(4, 4, 8, 8)),
    vae=VaeConfig(channels=8, norm_groups=4, channel_mult=(1, 2, 2), num_res_blocks=1, latent_channels=6),
    clip=ClipConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2),
)
"""Stride 4, latents of 6 channels, contexts 32 wide."""


@cache
def base_checkpoint(config: NetworkConfig = SMALL) -> RuleCheckpoint:
    """Return a rule-made checkpoint of what the student and the VAE need; no stage-one code is imported."""
    import torch

    from common.anytext2.keys import key_table
    from common.anytext2.unet import UNet
    from common.anytext2.vae import VAE
    from common.anytext2.writenet import WriteNet

    shapes: dict[str, tuple[int, ...]] = {}
    for part, kind in {"unet": UNet, "writenet": WriteNet, "vae": VAE}.items():
        with torch.device("meta"):
            state = kind(config).state_dict()
        for name, entry in key_table(part, state, config).items():
            shapes[entry.key] = entry.upstream_shape(state[name].shape)
    return RuleCheckpoint(shapes)


@cache
def teacher_checkpoint(config: NetworkConfig = SMALL) -> RuleCheckpoint:
    """Return a rule-made checkpoint of a whole teacher."""
    from stage1_teacher.teacher.keys import teacher_shapes

    return RuleCheckpoint(teacher_shapes(config))
