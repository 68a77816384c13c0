"""hypothesis: any record that the schema allows."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from common.grids import NUM_TRAIN_TIMESTEPS
from shards.records.meta import SampleMeta
from shards.records.record import CHUNK_TOKENS, Record

_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
_HALF_BITS = st.integers(0, 0x7BFF) | st.integers(0x8000, 0xFBFF)  # every finite float16
_COORDINATE = st.floats(-1e6, 1e6, allow_nan=False) | st.integers(-5000, 5000)


@st.composite
def metas(draw: st.DrawFn, rollouts: int, size: tuple[int, int], source: str) -> SampleMeta:
    lines = draw(st.integers(1, 3))
    polygon = st.lists(st.tuples(_COORDINATE, _COORDINATE), min_size=3, max_size=5)
    return SampleMeta(
        input_id=draw(st.text("0123456789abcdef", min_size=1, max_size=64)),
        caption=draw(_TEXT),
        text_caption=draw(_TEXT),
        texts=draw(st.lists(_TEXT, min_size=lines, max_size=lines)),
        languages=draw(st.lists(_TEXT, min_size=lines, max_size=lines)),
        polygons=draw(st.lists(polygon, min_size=lines, max_size=lines)),
        mode=draw(st.sampled_from(["generate", "edit"])),
        source=source,
        seeds=draw(st.lists(st.integers(0, 2**63 - 1), min_size=rollouts, max_size=rollouts)),
        size=size,
        guidance_scale=draw(st.floats(0, 100)),
    )


@st.composite
def records(draw: st.DrawFn) -> Record:
    rollouts, steps, channels = (draw(st.integers(1, n)) for n in (2, 3, 4))
    height, width, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 8]))
    size = (height * stride, width * stride)
    latent = (channels, height, width)
    context = draw(st.integers(1, 4))
    source = draw(st.sampled_from(["rollout", "noised"]))
    timesteps = draw(
        st.lists(st.integers(0, NUM_TRAIN_TIMESTEPS - 1), min_size=steps, max_size=steps, unique=True)
    )
    predictions = draw(st.booleans())

    def half(*shape: int) -> torch.Tensor:
        values = draw(
            st.lists(_HALF_BITS, min_size=1, max_size=12)
        )  # repeated: drawing each value would be too much
        return torch.from_numpy(np.resize(np.array(values, np.uint16).view(np.float16), shape))

    def mask(top: int) -> torch.Tensor:
        values = draw(st.lists(st.integers(0, top), min_size=1, max_size=40))
        return torch.from_numpy(np.resize(np.array(values, np.uint8), (1, *size)))

    return Record(
        meta=draw(metas(rollouts, size, source)),
        image_context=half(CHUNK_TOKENS * draw(st.integers(1, 3)), context),
        text_context=half(CHUNK_TOKENS, context),
        masked_latents=half(*latent),
        rollout_latents=half(rollouts, steps + 1, *latent),
        rollout_timesteps=torch.tensor(sorted(timesteps, reverse=True) if source == "rollout" else timesteps),
        glyphs=mask(1),
        positions=mask(255),
        x0_cond=half(rollouts, steps, *latent) if predictions else None,
        x0_uncond=half(rollouts, steps, *latent) if predictions else None,
    )
