"""How many bytes records will take, before any is made."""

from __future__ import annotations

import math
import tarfile

from common.config import Config

_HALF, _LONG = 2, 8
_SMALL_MEMBERS = 3
"""json and two masks: a block each, or a few."""
_SMALL_BYTES = 1536
"""Of each small member, about."""
_HEADER_BYTES = 256
"""Of a safetensors member, about."""
_TOKENS = 77
SIDECAR_BYTES = 330
"""Of a shard's sidecar for each record, about."""


def estimate_record_bytes(config: Config, *, chunks: int = 1) -> int:
    """Return about how many bytes of a shard one record takes; a tenth more or less.

    Args:
        config: model, inputs and precompute are used.
        chunks: k, pieces of 77 tokens of the image caption.
    """
    network, settings = config.load_network(), config.precompute
    latents = math.prod(network.latent_shape(config.inputs.size)) * _HALF
    context = _TOKENS * network.context_dim * _HALF
    states = settings.solver_steps // settings.record_every
    members = [
        (chunks + 1) * context + latents,  # conditioning
        settings.num_rollouts * (states + 1) * latents + states * _LONG,
    ]
    if settings.store_predictions:
        members.append(2 * settings.num_rollouts * states * latents)
    sizes = [_HEADER_BYTES + size for size in members] + [_SMALL_BYTES] * _SMALL_MEMBERS
    return sum(tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for size in sizes)
