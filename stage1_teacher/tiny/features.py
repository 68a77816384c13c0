"""Compute once what the denoiser's training needs of frozen networks: latents and the recognizer's features.

    python -m stage1_teacher.tiny.features --vae runs/tiny/vae --out runs/tiny/features --count 5500

Writes chunks of layouts, `00000.pt` and so on, each with several colourings; chunks that exist are left alone.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.files import atomic_write
from common.scripts import make_parser, run_script, start_training
from stage1_teacher.inputs.captions import image_caption
from stage1_teacher.rendering import lines as drawing
from stage1_teacher.teacher.glyph_embedding import font_lines, glyph_lines
from stage1_teacher.teacher.recognizer import load_recognizer
from stage1_teacher.teacher.text_encoder import caption_chunks, load_tokenizer
from stage1_teacher.tiny.ground import WORLDS
from stage1_teacher.tiny.linear_vae import LinearEncoder
from stage1_teacher.tiny.networks import MODEL_FOLDER, network_config
from stage1_teacher.tiny.scene import (
    FONT_FOLDER,
    FONTS,
    LENGTHS,
    SINGLE_LETTERS,
    Scene,
    draw_scene_plan,
    recolor,
    render_scene,
    text_mask,
)
from stage1_teacher.tiny.train_vae import load_trained

log = logging.getLogger(__name__)

LAYOUTS_PER_FILE = 100
SINGLE_EVERY = 3
"""Of a file, every third layout has single letters only, for what the recognizer's features say of a letter."""


class FeatureMaker:
    """The frozen networks, and what they make of a scene."""

    def __init__(self, vae: Path) -> None:
        """Load the VAE, rounded as it is shipped, and the recognizer; `vae` is as for `load_trained`."""
        config = network_config()
        autoencoder = load_trained(vae).requires_grad_(False)
        for parameter in autoencoder.parameters():
            parameter.copy_(parameter.half())
        self._encoder = LinearEncoder(autoencoder, config.stride)
        recognizer = load_recognizer(config, MODEL_FOLDER / "recognizer.safetensors")
        self._recognizer = recognizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 3x as fast
        self._blank: dict[bytes, Tensor] = {}
        self._tokenizer = load_tokenizer(MODEL_FOLDER / "clip", config)

    def latents(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1]."""
        return self._encoder(images)

    @torch.no_grad()
    def read(self, lines: Tensor) -> Tensor:
        """Return the recognizer's features (N, 40, 64) float16 of lines (N, 3, 48, 320)."""
        parts = [
            self._recognizer.features(part.contiguous(memory_format=torch.channels_last))
            for part in lines.split(4)
        ]
        return torch.cat(parts).half()

    def read_blank(self, lines: Tensor) -> Tensor:
        """Like `read`, for hints that show nothing: they differ only in how far the line reaches."""
        features = []
        for line in lines:
            key = line.numpy().tobytes()
            if key not in self._blank:
                self._blank[key] = self.read(line[None])[0]
            features.append(self._blank[key])
        return torch.stack(features)

    @torch.no_grad()
    def layout(self, scene: Scene, variants: int) -> dict[str, Any]:
        """Compute a layout's features, and its images' in several colourings.

        Returns:
            uint8: glyphs (1, H, W), coverage (1, H, W), of the letters, 0 to 255, positions (n, H, W); float16:
            glyph_features and blank_features (n, 40, 64), hint_features (v, n, 40, 64), latents and
            masked_latents (v, C, h, w); int64: lengths (n,), of the texts, fonts (n,), places in FONTS, tokens
            (v, 77); float32: colors (v, n, 3); bool: told (n,), whether the font is. The glyph map shows all
            lines.
        """
        size = (scene.size, scene.size)
        scenes = [scene, *(recolor(scene, variant) for variant in range(1, variants))]
        # The same arithmetic as stage one's reading of an image file.
        pixels = torch.stack([torch.from_numpy(render_scene(item)) for item in scenes])
        images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        polygons = [torch.tensor(line.polygon).float().numpy() for line in scene.lines]
        masks = torch.stack([torch.from_numpy(drawing.render_mask(polygon, size)) for polygon in polygons])
        letters = np.max([text_mask(line, scene.size) for line in scene.lines], axis=0)
        glyphs = torch.zeros(size, dtype=torch.uint8)
        drawn = []
        for line, polygon in zip(scene.lines, polygons, strict=True):
            font = FONT_FOLDER / line.map_font
            glyphs |= torch.from_numpy(drawing.render_glyph_map(line.text, polygon, font, line.color, size))
            drawn.append(torch.from_numpy(drawing.render_glyph_line(line.text, font)))
        blank_features = self.read_blank(font_lines(torch.zeros(1, *size), masks[:, None]))
        covered = masks.amax(0).float()
        latents = self.latents(torch.cat([images, (images - 10 * covered).clamp(-1, 1)]))
        captions = [image_caption(item.caption, suffix="", seed=0, input_id="") for item in scenes]
        return {
            "glyphs": glyphs[None],
            "coverage": torch.from_numpy(np.rint(255 * letters).astype(np.uint8))[None],
            "positions": masks,
            "glyph_features": self.read(glyph_lines(torch.stack(drawn))),
            "hint_features": self._read_hints(scene, images, glyphs, masks, polygons),
            "blank_features": blank_features,
            "latents": latents[: len(scenes)].half(),
            "masked_latents": latents[len(scenes) :].half(),
            "colors": torch.tensor([[line.color for line in item.lines] for item in scenes]).float(),
            "lengths": torch.tensor([len(line.text) for line in scene.lines]),
            "told": torch.tensor([line.told for line in scene.lines]),
            "fonts": torch.tensor([list(FONTS).index(line.font) for line in scene.lines]),
            "tokens": torch.tensor([caption_chunks(self._tokenizer, caption)[0] for caption in captions]),
        }

    def _read_hints(
        self, scene: Scene, images: Tensor, glyphs: Tensor, masks: Tensor, polygons: Sequence[NDArray[np.float32]]
    ) -> Tensor:
        """Read the lines' font hints as `render_input` makes them: (v, n, 40, 64).

        The drawn line of those whose font is asked for; of the others, what they look like in each image
        (v, 3, H, W). glyphs (H, W) and masks (n, H, W) are 0 or 1.
        """
        told = torch.tensor([line.told for line in scene.lines])
        asked_for = (glyphs * (masks * told[:, None, None]).amax(0)).float()
        if bool(told.all()):
            features = self.read(font_lines(asked_for[None], masks[:, None]))
            return features.expand(len(images), *features.shape).clone()
        read = []
        for image in images:
            hint = asked_for.numpy()
            for line, polygon in zip(scene.lines, polygons, strict=True):
                if not line.told:
                    hint = np.maximum(hint, drawing.cut_font_hint(image.numpy(), polygon))
            read.append(self.read(font_lines(torch.from_numpy(hint)[None], masks[:, None])))
        return torch.stack(read)


def write_chunks(options: argparse.Namespace, starts: Sequence[int]) -> None:
    """Write the chunks that begin at some of the layouts, unless they are there."""
    start_training(options.threads)
    maker = FeatureMaker(options.vae)
    for start in starts:
        path = options.out / f"{start // LAYOUTS_PER_FILE:05d}.pt"
        if path.exists():
            continue
        scenes = [
            draw_scene_plan(
                "teacher",
                options.seed,
                start + index,
                lengths=LENGTHS if index % SINGLE_EVERY else SINGLE_LETTERS,
                world=WORLDS[options.world],
            )
            for index in range(LAYOUTS_PER_FILE)
        ]
        layouts = [maker.layout(scene, options.variants) for scene in scenes]
        with atomic_write(path) as file:
            torch.save(layouts, file)
        log.info("wrote %s", path)


def main() -> None:
    """Parse the command line and write the chunks."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--vae", type=Path, required=True, help="run folder of train_vae, or a checkpoint: models/tiny"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=5500, help="layouts")
    parser.add_argument("--variants", type=int, default=8, help="images of a layout, in other colours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", choices=sorted(WORLDS), default="told", help="what they are drawn from")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that share the work; 0: this one does it"
    )
    parser.add_argument("--threads", type=int, default=0, help="of each process; 0: they share the cores")
    options = parser.parse_args()
    options.threads = options.threads or max(1, (os.cpu_count() or 1) // max(1, options.workers))
    options.out.mkdir(parents=True, exist_ok=True)
    starts = range(0, options.count, LAYOUTS_PER_FILE)
    if options.workers < 1:
        write_chunks(options, starts)
        return
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=write_chunks, args=(options, starts[worker :: options.workers]), daemon=True)
        for worker in range(options.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if failed := sum(process.exitcode != 0 for process in processes):
        raise SystemExit(f"features: {failed} of {len(processes)} processes failed; the same command goes on")


if __name__ == "__main__":
    run_script(main)
