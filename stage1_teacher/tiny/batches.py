"""Batches for the denoiser's training, put together from `features` chunks."""

from __future__ import annotations

from dataclasses import dataclass
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
MAX_LINES = 3


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
    weight: Tensor
    """(B, 1, h, w), mean 1: more where the text is."""
    noise: Tensor
    """(B K, C, h, w), image by image."""
    timesteps: Tensor
    """(B K,) int64."""


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

    def batch(
        self,
        seed: int,
        step: int,
        *,
        images: int,
        noises: int,
        blank_latents: Tensor,
        side: int | None = None,
        lowest: int = 0,
    ) -> TrainingBatch:
        """Draw a batch, keyed by (seed, step) (and by the layouts read so far).

        Args:
            seed: of the run.
            step: of the optimizer.
            images: B.
            noises: K.
            blank_latents: (C, h, w), of the image that shows nothing.
            side: pixels of a crop that is trained on, a multiple of 16; None for whole images.
            lowest: timestep drawn.
        """
        random_ = rng("batch", seed, step, side or 0)
        chosen = [self._choose(random_, blank_latents) for _ in range(images)]
        if side is not None:
            chosen = [_crop(item, side, random_) for item in chosen]
        stacked = {
            name: torch.stack([item[name] for item in chosen])
            for name in ("latents", "masked", "glyphs", "positions", "image_tokens", "text_tokens")
        }
        joined = {
            name: torch.cat([item[name] for item in chosen])
            for name in ("glyph_features", "where", "font_features", "colors")
        }
        g = generator("noise", seed, step, side or 0)
        latents = stacked["latents"].float()
        count = images * noises
        # One timestep from each of `count` equal strata, in random order: less noise in the loss.
        strata = (torch.randperm(count, generator=g) + torch.rand(count, generator=g)) / count
        latents_stride = stacked["positions"].shape[-1] // latents.shape[-1]
        weight = 1 + functional.max_pool2d(stacked["positions"].clamp(max=1), latents_stride)
        return TrainingBatch(
            latents=latents,
            hints=Hints(
                glyphs=stacked["glyphs"], positions=stacked["positions"], masked_latents=stacked["masked"].float()
            ),
            image_tokens=stacked["image_tokens"],
            text_tokens=stacked["text_tokens"],
            lines=[len(item["colors"]) for item in chosen],
            **joined,
            weight=weight / weight.mean(),
            noise=torch.randn((count, *latents.shape[1:]), generator=g),
            timesteps=(lowest + strata * (1000 - lowest)).long().clamp(max=999),
        )

    def _choose(self, random_: Any, blank_latents: Tensor) -> dict[str, Tensor]:
        layout = random_.choice(self.layouts)
        variants = len(layout["latents"])
        variant = 0 if random_.random() < FIRST_COLORING_SHARE else random_.randrange(variants)
        hinted = variant == 0 and random_.random() < HINT_SHARE
        dropped = random_.random()
        no_text = dropped < DROP_ALL + DROP_TEXT_CAPTION
        no_image_caption = dropped < DROP_ALL or 0 <= dropped - DROP_ALL - DROP_TEXT_CAPTION < DROP_IMAGE_CAPTION
        count = len(layout["positions"])
        phrase = random_.randrange(len(TEXT_PHRASES))
        colors = layout["colors"][variant].clone()
        for line in range(count):
            if random_.random() < UNKNOWN_COLOR_SHARE:
                colors[line] = UNKNOWN_COLOR
        kept = slice(0, 0) if no_text else slice(None)
        edit = random_.random() < EDIT_SHARE
        return {
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


def _crop(item: dict[str, Tensor], side: int, random_: Any) -> dict[str, Tensor]:
    """Cut the same square out of everything that lies over the picture."""
    size = item["glyphs"].shape[-1]
    stride = size // item["latents"].shape[-1]
    y, x = (16 * random_.randint(0, (size - side) // 16) for _ in range(2))
    cropped = dict(item)
    for name in ("glyphs", "positions"):
        cropped[name] = item[name][:, y : y + side, x : x + side]
    y, x, side = y // stride, x // stride, side // stride
    for name in ("latents", "masked"):
        cropped[name] = item[name][:, y : y + side, x : x + side]
    return cropped
