"""What every part works on: weights, annotations and shards of a network, full size or as small as it gets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.inputs import read_config
from bench.rule_weights import make_weights
from common.anytext2.checkpoint import write_checkpoint
from common.anytext2.conditioning import Uncond
from common.config import PROJECT_ROOT, Config
from common.overlap import Behind
from common.schedule import trailing_timesteps
from shards.files.manifest import create_or_check
from shards.records.meta import SampleMeta
from shards.records.record import Record
from shards.writing.writer import ShardWriter
from stage1_teacher.recording.identity import build_identity
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.keys import teacher_shapes
from stage1_teacher.tiny.data import write_dataset

SMALL_NETWORK = PROJECT_ROOT / "bench" / "small_network.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large everything is."""

    name: str
    settings: tuple[str, ...]
    """`section.key=value` for all parts."""
    compiles: bool
    """Whether what asks for model.compile is compiled; else it runs as it is."""
    matmul_side: int
    rows: tuple[int, ...]
    """Rows of a UNet call, the second one that of `solve_size`."""
    inputs: int
    """Of a timed `precompute`."""
    rounds: int
    """Timed steps."""
    batch: int
    """Samples of a training step."""
    records: int
    """Of the set that is trained on."""


FULL = Size(
    name="full",
    settings=(
        "model.dtype=bfloat16",
        "train.mixed_precision=bf16",
        "train.batch_size=16",
        "train.gradient_accumulation=1",
        "train.gradient_checkpointing=false",
        "train.ema_decay=0.0",
        "train.num_workers=2",
        "lora.rank=64",
    ),
    compiles=True,
    matmul_side=8192,
    rows=(16, 32, 64),
    inputs=96,
    rounds=10,
    batch=16,
    records=64,
)
SMALL = Size(
    name="small",
    settings=(
        "model.dtype=float32",
        "inputs.size=64",
        "precompute.solver_steps=2",
        "precompute.record_every=1",
        "precompute.batch_size=2",
        "train.batch_size=2",
        "train.num_phases=1",
        "train.num_workers=0",
        "lora.rank=2",
        "lora.alpha=2",
    ),
    compiles=False,
    matmul_side=128,
    rows=(2, 4, 8),
    inputs=4,
    rounds=2,
    batch=2,
    records=4,
)
SIZES = {size.name: size for size in (FULL, SMALL)}


@dataclass(frozen=True, slots=True)
class Place:
    """The benchmark's folder, and what lies in it."""

    out: Path
    size: Size

    @property
    def annotations(self) -> Path:
        """Of the drawn inputs."""
        return self.out / "data" / "data.json"

    @property
    def shards(self) -> Path:
        """A set of made-up records."""
        return self.out / "shards"

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen networks."""
        return torch.bfloat16 if self.size is FULL else torch.float32

    def config(self, *overrides: str) -> Config:
        """Return the configuration of all parts with a part's own settings; compiled where the size compiles."""
        small = self.size is SMALL
        base = self.out / "small.toml" if small else PROJECT_ROOT / "configs" / "sd15.toml"
        own = [f"model.checkpoint={self.out / 'weights.safetensors'}", "train.max_steps=1000000"]
        own += [f"model.clip={PROJECT_ROOT / 'models' / 'tiny' / 'clip'}", "train.log_every=1000000"]
        asked = [each for each in overrides if self.size.compiles or not each.startswith("model.compile=")]
        return read_config(base, [*own, *self.size.settings, *asked])


def prepare_place(place: Place) -> None:
    """Make what is not there yet: weights (seconds), drawn inputs, and a set of made-up records."""
    place.out.mkdir(parents=True, exist_ok=True)
    (place.out / "network.toml").write_text(SMALL_NETWORK.read_text())
    font = PROJECT_ROOT / "models" / "fonts" / "DejaVuSans.ttf"
    (place.out / "small.toml").write_text(f'[model]\nnetwork = "network.toml"\n[inputs]\nfont = "{font}"\n')
    config = place.config()
    weights, draw = place.out / "weights.safetensors", partial(write_dataset, place.out / "data", seed=1)
    with Behind("draw", threaded=True) as drawing:
        if not place.annotations.exists():
            drawing.do(partial(draw, count=place.size.inputs, size=config.inputs.size))
        if not weights.exists():
            write_checkpoint(weights, make_weights(teacher_shapes(config.load_network())))
        if not list(place.shards.glob("shard-*.json")):
            write_records(place.shards, config, place.size.records)


def write_records(folder: Path, config: Config, count: int) -> None:
    """Write a set of a configuration, two shards of records that hold noise: a step takes as long with them."""
    identity = build_identity(config, RenderSettings.from_config(config))
    context = torch.zeros(77, config.load_network().context_dim).half()
    uncond = Uncond(image_context=context, text_context=context)
    manifest, _ = create_or_check(folder, identity, {}, lambda: uncond)
    for shard, numbers in enumerate((range(count // 2), range(count // 2, count))):
        with ShardWriter(folder, shard, identity_sha256=manifest.identity_sha256, provenance={}) as writer:
            for number in numbers:
                writer.add(number, make_record(config, number))
            writer.commit()


def make_record(config: Config, number: int) -> Record:
    """Make a record of a configuration's sizes with random values and one line of text."""
    network, settings, side = config.load_network(), config.precompute, config.inputs.size
    generator = torch.Generator().manual_seed(number)

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    latent, width = network.latent_shape(side), network.context_dim
    timesteps = trailing_timesteps(settings.solver_steps)[:: settings.record_every]
    positions = torch.zeros(1, side, side, dtype=torch.uint8)
    positions[:, side // 4 : side // 2, side // 8 : side // 2] = 1
    box = ((side // 8, side // 4), (side // 2, side // 4), (side // 2, side // 2), (side // 8, side // 2))
    meta = SampleMeta(
        input_id=f"{number:032x}",
        caption="a shop front",
        text_caption="Text says * . ",
        texts=("OPEN",),
        languages=("Latin",),
        polygons=(box,),
        mode="generate",
        source="rollout",
        seeds=(number,),
        size=(side, side),
        guidance_scale=settings.guidance_scale,
    )
    return Record(
        meta=meta,
        image_context=half(77, width),
        text_context=half(77, width),
        masked_latents=half(*latent),
        rollout_latents=half(1, len(timesteps) + 1, *latent),
        rollout_timesteps=timesteps,
        glyphs=positions,
        positions=positions,
    )
