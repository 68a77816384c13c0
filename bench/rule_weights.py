"""Made-up weights of a network of any size, the same on every machine: of each key by a rule, all within seconds.

tests/golden_rule.py makes test networks of them, made_up.py and bench_gpu.py the full-size one.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from common.anytext2.checkpoint import schedule_buffers
from common.anytext2.keys import POSITION_IDS_KEY, SCHEDULE_KEYS

LAST_LAYER = "model.diffusion_model.out.2.weight"
"""Of the UNet."""
CALM = 0.01
"""What the last layer is multiplied by, so that a solve from noise with guidance stays within float16."""


def rule_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor that the rule puts under a key: activations keep their size, norms scale by about 1."""
    if key in SCHEDULE_KEYS:
        return schedule_buffers()[key]
    if key == POSITION_IDS_KEY:
        return torch.arange(shape[-1]).expand(shape)
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    x = torch.randn(shape, generator=generator, dtype=torch.float32)
    if key.endswith("running_var"):
        return 1 + 0.1 * x.abs()
    if len(shape) <= 1:
        return 1 + 0.02 * x if key.endswith("weight") else 0.02 * x
    if "embedding.weight" in key:
        return 0.02 * x
    return x / math.sqrt(math.prod(shape[1:]))


def make_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Make the weights of a checkpoint, float16, on all cores; those of a whole solve that stays finite."""

    def make(item: tuple[str, tuple[int, ...]]) -> tuple[str, Tensor]:
        key, shape = item
        tensor = rule_tensor(key, shape) * (CALM if key == LAST_LAYER else 1)
        half = tensor.is_floating_point() and key not in SCHEDULE_KEYS
        return key, (tensor.half() if half else tensor).contiguous()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(make, shapes.items()))
