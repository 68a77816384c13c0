"""Batches for the denoiser's training, put together from `features` chunks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.anytext2.config import NetworkConfig
from common.anytext2.hints import Hints
from common.seeding import generator, rng
from stage1_teacher.captions import PLACEHOLDER, TEXT_PHRASES
from stage1_teacher.glyph_embedding import UNKNOWN_COLOR, PositionEncoder
from stage1_teacher.text_encoder import chunk_tokens, load_tokenizer
from stage1_teacher.tiny.networks import MODEL_FOLDER

DROP_ALL, DROP_IMAGE_CAPTION, DROP_TEXT_CAPTION = 0.1, 0.04, 0.04
"""Shares of the images that lose their captions: both (guidance's other branch), or one."""
EDIT_SHARE = 0.2
FIRST_COLORING_SHARE, HINT_SHARE = 0.4, 0.6
"""Only the first colouring of a layout has font hints; that share of it shows them."""
UNKNOWN_COLOR_SHARE = 0.08
TEXT_WEIGHT = 4.0
"""What errors inside of the lines' boxes count more than those of the ground."""
MAX_LINES = 3
PATCH, PATCH_TIMESTEP = 32, 600
"""Side of a patch, pixels, and the lowest timestep at which it is seen."""
COLOR_CELL = 8
"""Pixels of a cell of the map of the lines' colours."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingBatch:
    """B images with K noises each."""

    latents: Tensor
    """(B, C, h, w)."""
    hints: Hints
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
    color_map: Tensor
    """(B, 3, H / COLOR_CELL, W / COLOR_CELL): the lines' colours where the lines are, in -1 to 1."""
    color_weight: Tensor
    """(B, 1, ...) of the same size: 0 where no line of a known colour is, up to 1."""
    weight: Tensor
    """(B, 1, h, w), mean 1: more where the text is."""
    noise: Tensor
    """(B K, C, h, w), image by image."""
    timesteps: Tensor
    """(B K,) int64."""

    def to(self, device: torch.device) -> TrainingBatch:
        """Return the batch on a device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "lines"}
        return replace(self, **{name: value.to(device) for name, value in moved.items()})


class FeatureStore:
    """The layouts of a folder of chunks, new chunks included as they are written."""

    def __init__(self, folder: Path, position_encoder: PositionEncoder, config: NetworkConfig) -> None:
        """Remember where the chunks are; `refresh` reads them."""
        self.layouts: list[dict[str, Any]] = []
        self._folder, self._encoder, self._read = folder, position_encoder, set[str]()
        tokenizer = load_tokenizer(MODEL_FOLDER / "clip", config)

        def tokens(caption: str) -> Tensor:
            ids = tokenizer(caption, add_special_tokens=False)["input_ids"]
            return torch.tensor(chunk_tokens(ids, tokenizer.bos_token_id, tokenizer.eos_token_id)[0])

        self.empty_tokens = tokens("")
        self.text_tokens = {
            count: [tokens(phrase + " , ".join([PLACEHOLDER] * count) + " . ") for phrase in TEXT_PHRASES]
            for count in range(1, MAX_LINES + 1)
        }

    @torch.no_grad()
    def refresh(self) -> int:
        """Read the chunks that are new; returns the number of layouts."""
        for path in sorted(self._folder.glob("*.pt")):
            if path.name not in self._read:
                chunk = torch.load(path, weights_only=True)
                where = self._encoder(torch.cat([item["positions"] for item in chunk])[:, None].float())
                counts = [len(item["positions"]) for item in chunk]
                for item, place in zip(chunk, where.split(counts), strict=True):
                    item["where"] = place
                self.layouts += chunk
                self._read.add(path.name)
        return len(self.layouts)

    def batch(self, seed: int, step: int, *, images: int, noises: int, blank_latents: Tensor) -> TrainingBatch:
        """Draw a batch, keyed by (seed, step) (and by the layouts read so far).

        Args:
            seed: of the run.
            step: of the optimizer.
            images: B.
            noises: K.
            blank_latents: (C, h, w), of the image that shows nothing.
        """
        random_ = rng("batch", seed, step)
        chosen = [self._choose(random_, blank_latents) for _ in range(images)]
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
        chosen = [_crop(self._choose(random_, blank_latents, ground_only=True), random_) for _ in range(images)]
        return _stack(chosen, 1, generator("patches' noise", seed, step), lowest=PATCH_TIMESTEP)

    def _choose(self, random_: Any, blank_latents: Tensor, *, ground_only: bool = False) -> dict[str, Tensor]:
        layout = random_.choice(self.layouts)
        variants = len(layout["latents"])
        variant = 0 if random_.random() < FIRST_COLORING_SHARE else random_.randrange(variants)
        hinted = variant == 0 and random_.random() < HINT_SHARE
        dropped = DROP_ALL if ground_only else random_.random()  # DROP_ALL: of the two captions, only the text's
        no_text = dropped < DROP_ALL + DROP_TEXT_CAPTION
        no_image_caption = dropped < DROP_ALL or 0 <= dropped - DROP_ALL - DROP_TEXT_CAPTION < DROP_IMAGE_CAPTION
        count = len(layout["positions"])
        phrase = random_.randrange(len(TEXT_PHRASES))
        colors = layout["colors"][variant].clone()
        for line in range(count):
            if random_.random() < UNKNOWN_COLOR_SHARE:
                colors[line] = UNKNOWN_COLOR
        kept = slice(0, 0) if no_text else slice(None)
        edit = random_.random() < EDIT_SHARE and not ground_only  # or the masked image would tell it
        color_map, color_weight = _map_colors(layout["positions"].float(), colors, told=not no_text)
        return {
            "color_map": color_map,
            "color_weight": color_weight,
            "latents": layout["latents"][variant],
            "masked": layout["masked_latents"][variant].float() if edit else blank_latents,
            "glyphs": layout["glyphs"].float(),
            "positions": layout["positions"].float().sum(0, keepdim=True),
            "image_tokens": self.empty_tokens if no_image_caption else layout["tokens"][variant],
            "text_tokens": self.empty_tokens if no_text else self.text_tokens[count][phrase],
            "glyph_features": layout["glyph_features"][kept].float(),
            "where": layout["where"][kept],
            "font_features": layout["hint_features" if hinted else "blank_features"][kept].float(),
            "colors": colors[kept],
        }


def _map_colors(positions: Tensor, colors: Tensor, *, told: bool) -> tuple[Tensor, Tensor]:
    """Paint lines' colours, (n, 3), where their masks (n, H, W) are; `told`: whether a text caption says them."""
    known = (colors[:, 0] != UNKNOWN_COLOR) & told
    share = functional.avg_pool2d(positions, COLOR_CELL) * known[:, None, None]  # (n, H / cell, W / cell)
    weight = share.sum(0, keepdim=True)
    painted = torch.einsum("nyx,nc->cyx", share, colors / 127.5 - 1) / weight.clamp(min=1e-3)
    return painted, weight.clamp(max=1)


def _stack(chosen: list[dict[str, Tensor]], noises: int, g: torch.Generator, lowest: int = 0) -> TrainingBatch:
    """Put images together, each under several noises at timesteps of at least `lowest`."""
    stacked = {
        name: torch.stack([item[name] for item in chosen])
        for name in (
            "latents",
            "masked",
            "glyphs",
            "positions",
            "image_tokens",
            "text_tokens",
            "color_map",
            "color_weight",
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
    latents_stride = stacked["positions"].shape[-1] // latents.shape[-1]
    weight = 1 + TEXT_WEIGHT * functional.max_pool2d(stacked["positions"].clamp(max=1), latents_stride)
    return TrainingBatch(
        latents=latents,
        hints=Hints(
            glyphs=stacked["glyphs"], positions=stacked["positions"], masked_latents=stacked["masked"].float()
        ),
        image_tokens=stacked["image_tokens"],
        text_tokens=stacked["text_tokens"],
        lines=[len(item["colors"]) for item in chosen],
        **joined,
        color_map=stacked["color_map"],
        color_weight=stacked["color_weight"],
        weight=weight / weight.mean(),
        noise=torch.randn((count, *latents.shape[1:]), generator=g),
        timesteps=(lowest + strata * (1000 - lowest)).long().clamp(max=999),
    )


def _crop(item: dict[str, Tensor], random_: Any) -> dict[str, Tensor]:
    """Cut the same square of PATCH pixels out of everything that lies over the picture."""
    size = item["glyphs"].shape[-1]
    y, x = (16 * random_.randint(0, (size - PATCH) // 16) for _ in range(2))
    cropped = dict(item)
    for name in ("glyphs", "positions", "latents", "masked", "color_map", "color_weight"):
        cell = size // item[name].shape[-1]
        cropped[name] = item[name][:, y // cell : (y + PATCH) // cell, x // cell : (x + PATCH) // cell]
    return cropped
