"""Every key of a whole teacher's checkpoint, for a network of any size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from common.anytext2.config import NetworkConfig
from common.anytext2.keys import SCHEDULE_KEYS, key_table
from common.anytext2.unet import UNet
from common.anytext2.vae import VAE
from common.anytext2.writenet import WriteNet
from common.grids import NUM_TRAIN_TIMESTEPS
from stage1_teacher.teacher.glyph_embedding import GlyphEmbedding
from stage1_teacher.teacher.recognizer import Recognizer
from stage1_teacher.teacher.text_encoder import build_clip

PART_BUILDERS: dict[str, Callable[[NetworkConfig], nn.Module]] = {
    "unet": UNet,
    "writenet": WriteNet,
    "vae": VAE,
    "clip": build_clip,
    "embedding": lambda config: GlyphEmbedding(config.context_dim),
    "recognizer": lambda _config: Recognizer(),
}
"""What builds each part of the network, by the names of `keys.PREFIXES`."""


def teacher_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Return all keys of a teacher's checkpoint with their shapes; allocates no weights."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(SCHEDULE_KEYS, (NUM_TRAIN_TIMESTEPS,))
    for part, build in PART_BUILDERS.items():
        with torch.device("meta"):
            state = build(config).state_dict()
        for name, entry in key_table(part, state, config).items():
            shapes[entry.key] = entry.upstream_shape(state[name].shape)
    return shapes
