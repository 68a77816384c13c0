"""Batches for the denoiser's training, put together from `features` chunks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.anytext2.conditioning import Hints
from common.anytext2.config import NetworkConfig
from common.errors import DataError
from common.schedule import make_alphas_cumprod
from common.seeding import generator, rng
from common.tensors import Tensors
from stage1_teacher.inputs.captions import PLACEHOLDER, TEXT_PHRASES
from stage1_teacher.inputs.input import UNKNOWN_COLOR
from stage1_teacher.teacher.glyph_embedding import PositionEncoder
from stage1_teacher.teacher.text_encoder import caption_chunks, load_tokenizer
from stage1_teacher.tiny.ground import BAND
from stage1_teacher.tiny.networks import MODEL_FOLDER
from stage1_teacher.tiny.scene import FONTS

DROP_ALL, DROP_IMAGE_CAPTION, DROP_TEXT_CAPTION = 0.1, 0.04, 0.04
"""Shares of the images that lose their captions: both (guidance's other branch), or one."""
EDIT_SHARE = 0.4
"""Of the images, that show WriteNet what lies outside of the boxes. With a fifth of them, and grounds that
captions told whole, the given image had nothing to add, and edit mode was not learnt."""
HINT_SHARE = 0.8
"""Of the images, that show the lines' font hints."""
UNTOLD_HINT_SHARE = 0.5
"""Of the lines in these whose font is not told, that are shown all the same, as the image's own letters."""
UNKNOWN_COLOR_SHARE = 0.08
SINGLES_SHARE = 0.2
"""Of the images, that are of layouts whose lines are single letters."""
TRAINED_UNMAPPED_SHARE = 0.75
"""Of the single letters, that the glyph map does not show: more than in the data."""
TEXT_WEIGHT, TEXT_HEIGHT = 10.0, 24.0
"""What errors inside of a line's box count more than those of the ground, for a box of this height, pixels. Of
small letters, that need more care, they count up to three times as much, of large ones down to half."""
MAX_LINES = 3
GRAIN, GRAIN_SHARE, MAX_EXCESS = 0.2, 0.25, 0.25
"""Largest standard deviation of the grain that latents are seen with, the share of the noises that have any, and
its largest part of the timestep's own noise."""
JUMP_SHARE, JUMPS, MAX_OWN_STEPS = 0.3, (20, 150), 3
"""Of the noises, the share that is reached by steps of the network's own; the least and greatest number of
timesteps that these cross together (fewer where they would start above 999); and how many steps at most. What is
left to chance settles on the way: a long jump settles it otherwise than the true picture has it, and that
difference would then be asked for as noise."""
PATCH, PATCH_TIMESTEP = 32, 600
"""Side of a patch, pixels, and the lowest timestep at which it is seen."""
LOOK_CELL = 8
"""Pixels of a cell of the maps of the lines' looks."""
LOOKS = {"color": 3, "font": len(FONTS)}
"""What lines look like beyond their letters, and the channels that say it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingBatch(Tensors):
    """B images with K noises each."""

    latents: Tensor
    """(B, C, h, w)."""
    hints: Hints
    coverage: Tensor
    """(B, 1, H, W), 0 to 1: how much of each pixel letters cover; about where that is not 0, the glyph map says of
    the lines it shows."""
    image_tokens: Tensor
    """(B, 77) int64."""
    text_tokens: Tensor
    """(B, 77) int64."""
    lines: list[int]
    """Lines embedded of each image; 0 where the text caption is dropped."""
    glyph_features: Tensor
    """(sum of lines, 40, 64), as are the next."""
    where: Tensor
    """(sum of lines, c)."""
    font_features: Tensor
    colors: Tensor
    """(sum of lines, 3)."""
    looks: dict[str, Tensor]
    """Of each of LOOKS, where the lines are: (B, its channels + 1, H / LOOK_CELL, W / LOOK_CELL). Colours from -1
    to 1, fonts one-hot; the last channel is the weight, 0 where no line is or nothing is told, up to 1."""
    shown: Tensor
    """(B, 1, h, w), 1 where `hints` show an image, 0 elsewhere: edit mode, outside of the boxes."""
    weight: Tensor
    """(B, 1, h, w), mean 1: more where the text is."""
    noise: Tensor
    """(B K, C, h, w), image by image."""
    grain: Tensor
    """(B K, C, h, w): noise in the latents beyond the timestep's own, which is to be predicted with it. A solve's
    own errors look like it; a network that trusts the timestep takes them for the picture (docs/results.md)."""
    jumps: Tensor
    """(B K,) int64: by how many timesteps DDIM steps of the network's own lead to the noisy latents; 0: made of
    the true ones. What they get wrong is to be predicted with the noise: a solve goes on from its own errors."""
    own_steps: int
    """How many steps lead there, of about the same length; one number for the whole batch."""
    timesteps: Tensor
    """(B K,) int64."""


class FeatureStore:
    """The layouts of a folder of chunks, new chunks included as they are written."""

    def __init__(self, folder: Path, position_encoder: PositionEncoder, config: NetworkConfig) -> None:
        """Remember where the chunks are; `refresh` reads them."""
        self.singles: list[dict[str, Any]] = []
        """Layouts whose lines are single letters."""
        self.others: list[dict[str, Any]] = []
        """All others."""
        self._folder, self._encoder, self._read = folder, position_encoder, set[str]()
        tokenizer = load_tokenizer(MODEL_FOLDER / "clip", config)

        def tokens(caption: str) -> Tensor:
            return torch.tensor(caption_chunks(tokenizer, caption)[0])

        self.empty_tokens = tokens("")
        self.text_tokens = {
            count: [tokens(phrase + " , ".join([PLACEHOLDER] * count) + " . ") for phrase in TEXT_PHRASES]
            for count in range(1, MAX_LINES + 1)
        }

    @property
    def layouts(self) -> list[dict[str, Any]]:
        """All layouts."""
        return self.singles + self.others

    @torch.no_grad()
    def refresh(self) -> int:
        """Read the chunks that are new; returns the number of layouts.

        Raises:
            DataError: a chunk is of an earlier version.
        """
        for path in sorted(self._folder.glob("*.pt")):
            if path.name not in self._read:
                chunk = torch.load(path, weights_only=True)
                if "told" not in chunk[0]:
                    raise DataError(
                        f"{path}: received layouts that do not say whose fonts are told, expected what"
                        " stage1_teacher.tiny.features writes; this is an earlier version's: remove its folder"
                    )
                where = self._encoder(torch.cat([item["positions"] for item in chunk])[:, None].float())
                counts = [len(item["positions"]) for item in chunk]
                for item, place in zip(chunk, where.split(counts), strict=True):
                    item["where"] = place
                for item in chunk:
                    (self.singles if int(item["lengths"].max()) == 1 else self.others).append(item)
                self._read.add(path.name)
        return len(self.layouts)

    def batch(
        self, seed: int, step: int, *, images: int, noises: int, blank_latents: Tensor, singles: bool = False
    ) -> TrainingBatch:
        """Draw a batch, keyed by (seed, step) (and by the layouts read so far).

        Args:
            seed: of the run.
            step: of the optimizer.
            images: B.
            noises: K.
            blank_latents: (C, h, w), of the image that shows nothing.
            singles: of layouts with single letters only.
        """
        random_ = rng("batch", seed, step)
        share = 1.0 if singles else SINGLES_SHARE
        chosen = [self._choose(random_, blank_latents, singles=share) for _ in range(images)]
        return _stack(chosen, noises, generator("noise", seed, step))

    def patches(self, seed: int, step: int, *, images: int, blank_latents: Tensor) -> TrainingBatch:
        """Draw small crops of images at high noise, for what captions say of the ground.

        A patch costs a ninth of an image and shows the ground as well. Its lines' tokens are left out: they say
        where the lines are in the whole image.

        Args:
            seed: of the run.
            step: of the optimizer.
            images: B; each under one noise.
            blank_latents: (C, h, w), of the image that shows nothing.
        """
        random_ = rng("patches", seed, step)
        whole = [self._choose(random_, blank_latents, ground_only=True) for _ in range(images)]
        chosen = [_crop(item, random_) for item in whole]
        return _stack(chosen, 1, generator("patches' noise", seed, step), lowest=PATCH_TIMESTEP)

    def _choose(
        self, random_: Any, blank_latents: Tensor, *, singles: float = SINGLES_SHARE, ground_only: bool = False
    ) -> dict[str, Tensor]:
        layout = random_.choice(self.singles if random_.random() < singles else self.others)
        variant = random_.randrange(len(layout["latents"]))
        hinted = random_.random() < HINT_SHARE
        dropped = DROP_ALL if ground_only else random_.random()  # DROP_ALL: of the two captions, only the text's
        no_text = dropped < DROP_ALL + DROP_TEXT_CAPTION
        no_image_caption = dropped < DROP_ALL or 0 <= dropped - DROP_ALL - DROP_TEXT_CAPTION < DROP_IMAGE_CAPTION
        count = len(layout["positions"])
        phrase = random_.randrange(len(TEXT_PHRASES))
        colors = layout["colors"][variant].clone()
        for line in range(count):
            if random_.random() < UNKNOWN_COLOR_SHARE:
                colors[line] = UNKNOWN_COLOR[0]
        kept = slice(0, 0) if no_text else slice(None)
        edit = random_.random() < EDIT_SHARE and not ground_only  # or the masked image would tell it
        positions = layout["positions"].float()
        glyphs = layout["glyphs"].float()
        for position, length in zip(positions, layout["lengths"].tolist(), strict=True):
            if length == 1 and random_.random() < TRAINED_UNMAPPED_SHARE:
                glyphs = glyphs * (1 - position)
        known = (colors[:, 0] != UNKNOWN_COLOR[0]) & (not no_text)
        one_hot = functional.one_hot(layout["fonts"], len(FONTS)).float()
        hints = torch.tensor(
            [hinted and (told or random_.random() < UNTOLD_HINT_SHARE) for told in layout["told"].tolist()]
        )
        font_features = torch.where(
            hints[:, None, None], layout["hint_features"][variant], layout["blank_features"]
        ).float()
        cell = positions.shape[-1] // blank_latents.shape[-1]
        shown = 1 - functional.max_pool2d(positions.amax(0, keepdim=True), cell)  # (1, h, w)
        return {
            "color": _paint(positions, colors / 127.5 - 1, known),
            "font": _paint(positions, one_hot, layout["told"] & (not no_text)),
            "latents": layout["latents"][variant],
            "masked": layout["masked_latents"][variant].float() if edit else blank_latents,
            "shown": shown * edit,
            "glyphs": glyphs,
            "coverage": layout["coverage"].float() / 255,
            "positions": positions.sum(0, keepdim=True),
            "importance": _importance(positions),
            "image_tokens": self.empty_tokens if no_image_caption else layout["tokens"][variant],
            "text_tokens": self.empty_tokens if no_text else self.text_tokens[count][phrase],
            "glyph_features": layout["glyph_features"][kept].float(),
            "where": layout["where"][kept],
            "font_features": font_features[kept],
            "colors": colors[kept],
        }


def _importance(positions: Tensor) -> Tensor:
    """Return the lines' weights in their masks (n, H, W), beyond the ground's: (1, H, W)."""
    heights = positions.sum((1, 2)) / positions.amax(1).sum(1).clamp(min=1)  # mean height of a column
    weights = TEXT_WEIGHT * (TEXT_HEIGHT / heights.clamp(min=1)).pow(3).clamp(0.5, 3)
    return (positions * weights[:, None, None]).amax(0, keepdim=True)


def _paint(positions: Tensor, values: Tensor, known: Tensor) -> Tensor:
    """Paint lines' values (n, c), where known (n,), into their masks (n, H, W): a look of TrainingBatch."""
    share = functional.avg_pool2d(positions, LOOK_CELL) * known[:, None, None]  # (n, H / cell, W / cell)
    weight = share.sum(0, keepdim=True)
    painted = torch.einsum("nyx,nc->cyx", share, values) / weight.clamp(min=1e-3)
    return torch.cat([painted, weight.clamp(max=1)])


def _stack(chosen: list[dict[str, Tensor]], noises: int, g: torch.Generator, lowest: int = 0) -> TrainingBatch:
    """Put images together, each under several noises at timesteps of at least `lowest`."""
    stacked = {
        name: torch.stack([item[name] for item in chosen])
        for name in (
            "latents",
            "masked",
            "shown",
            "glyphs",
            "coverage",
            "positions",
            "importance",
            "image_tokens",
            "text_tokens",
            *LOOKS,
        )
    }
    joined = {
        name: torch.cat([item[name] for item in chosen])
        for name in ("glyph_features", "where", "font_features", "colors")
    }
    latents = stacked["latents"].float()
    count = len(latents) * noises
    # One timestep from each of `count` equal strata, in random order: less noise in the loss.
    strata = (torch.randperm(count, generator=g) + torch.rand(count, generator=g)) / count
    timesteps = (lowest + strata * (1000 - lowest)).long().clamp(max=999)
    latents_stride = stacked["positions"].shape[-1] // latents.shape[-1]
    weight = 1 + functional.max_pool2d(stacked["importance"], latents_stride)
    return TrainingBatch(
        latents=latents,
        hints=Hints(
            glyphs=stacked["glyphs"], positions=stacked["positions"], masked_latents=stacked["masked"].float()
        ),
        coverage=stacked["coverage"],
        image_tokens=stacked["image_tokens"],
        text_tokens=stacked["text_tokens"],
        lines=[len(item["colors"]) for item in chosen],
        **joined,
        looks={name: stacked[name] for name in LOOKS},
        shown=stacked["shown"],
        weight=weight / weight.mean(),
        noise=torch.randn((count, *latents.shape[1:]), generator=g),
        grain=torch.randn((count, *latents.shape[1:]), generator=g) * _grain_sizes(timesteps, g),
        jumps=_draw_jumps(timesteps, g),
        own_steps=int(torch.randint(1, MAX_OWN_STEPS + 1, (), generator=g)),
        timesteps=timesteps,
    )


def _grain_sizes(timesteps: Tensor, g: torch.Generator) -> Tensor:
    """Draw the standard deviation of each noise's grain, (B K, 1, 1, 1)."""
    level = make_alphas_cumprod()[timesteps]
    size = GRAIN * torch.rand(len(timesteps), generator=g)
    size *= torch.rand(len(timesteps), generator=g) < GRAIN_SHARE
    return size.minimum(MAX_EXCESS * ((1 - level) / level).sqrt())[:, None, None, None]


def _draw_jumps(timesteps: Tensor, g: torch.Generator) -> Tensor:
    jumps = torch.randint(JUMPS[0], JUMPS[1] + 1, timesteps.shape, generator=g).minimum(999 - timesteps)
    return jumps * (torch.rand(timesteps.shape, generator=g) < JUMP_SHARE)


def _crop(item: dict[str, Tensor], random_: Any) -> dict[str, Tensor]:
    """Cut the same square of PATCH pixels out of everything that lies over the picture.

    Stripes and squares of the ground must start in it as they do in the image, as the caption says.
    """
    size = item["glyphs"].shape[-1]
    y, x = (2 * BAND * random_.randint(0, (size - PATCH) // (2 * BAND)) for _ in range(2))
    cropped = dict(item)
    for name in ("glyphs", "coverage", "positions", "importance", "latents", "masked", "shown", *LOOKS):
        cell = size // item[name].shape[-1]
        cropped[name] = item[name][:, y // cell : (y + PATCH) // cell, x // cell : (x + PATCH) // cell]
    return cropped
