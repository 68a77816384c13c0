"""Compare our network with golden values from upstream's own code.

    python -m tests.parity tests/golden/tiny.safetensors [FILE...] [--tolerance 1e-4] [--checkpoint FILE]

Takes any file of the layout that golden/README.md describes, of a network of any size: its metadata says which.
The network is filled through its checkpoint keys by the golden rule, or from --checkpoint where the file was made
with real weights (`make_golden.py`), part by part, so that a full-size one needs little more memory
than its UNet. Each part gets upstream's own inputs, so that an error shows where it arises.
One line per tensor: its name and relative error. Exit code 1 if one is above the tolerance.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.anytext2.checkpoint import load_unet, load_vae, load_writenet
from common.anytext2.checkpoint_file import CheckpointFile
from common.anytext2.conditioning import Hints
from common.anytext2.config import NetworkConfig
from common.anytext2.unet import Control, UNet
from common.ddim import upstream_grid
from common.errors import AppError, DataError
from stage1_teacher.teacher.glyph_embedding import font_lines, glyph_lines, load_glyph_embedding
from stage1_teacher.teacher.keys import teacher_shapes
from stage1_teacher.teacher.recognizer import load_recognizer
from stage1_teacher.teacher.solver import record_rollout
from stage1_teacher.teacher.text_encoder import (
    CAPTION_TOKENS,
    chunk_tokens,
    encode_tokens,
    encode_with_lines,
    load_clip,
)
from tests.golden_rule import RuleCheckpoint
from tests.upstream_config import network_config_from_upstream

Results = Iterator[tuple[str, Tensor]]
GIVEN = "in."


@dataclass(frozen=True)
class Golden:
    """A golden file: upstream's inputs and outputs, and the network they belong to."""

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    config: NetworkConfig
    weights: CheckpointFile

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise DataError(f"golden file {self.path}: no tensor {name}")
        return self.tensors[name]

    @property
    def lines(self) -> list[tuple[int, int]]:
        """(sample, line) of every real line, in order."""
        return [(i, j) for i, count in enumerate(self.meta["n_lines"]) for j in range(count)]

    @property
    def hints(self) -> Hints:
        return Hints(
            glyphs=(self["in.glyphs"].sum(dim=(1, 2)) != 0).float()[:, None],  # (B, 1, H, W)
            positions=self["in.positions"].sum(dim=1),  # (B, 1, H, W)
            masked_latents=self["in.masked_latents" if "in.masked_latents" in self else "vae.masked_latents"],
        )


def read_golden(path: Path, checkpoint: Path | None = None) -> Golden:
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["meta"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"golden file {path}: {error}; expected the layout of golden/README.md") from None
    config = network_config_from_upstream(meta["network"])
    if (meta.get("weights") == "checkpoint") != (checkpoint is not None):
        made = "real weights" if checkpoint is None else "the golden rule"
        remedy = "give --checkpoint FILE" if checkpoint is None else "leave --checkpoint out"
        raise DataError(f"golden file {path}: it was made with {made}; {remedy}")
    weights = RuleCheckpoint(teacher_shapes(config)) if checkpoint is None else CheckpointFile(checkpoint)
    return Golden(path=path, tensors=tensors, meta=meta, config=config, weights=weights)


def vae(golden: Golden) -> Results:
    network = load_vae(golden.config, golden.weights)
    if "in.image" in golden:
        yield "vae.mean", network.moments(golden["in.image"])[0]
        yield "vae.logvar", network.moments(golden["in.image"])[1]
        yield "vae.latents", network.encode(golden["in.image"])
        yield "vae.decoded", network.decode(golden["vae.latents"])
    yield "vae.masked_mean", network.moments(golden["in.masked_image"])[0]
    yield "vae.masked_logvar", network.moments(golden["in.masked_image"])[1]
    yield "vae.masked_latents", network.encode(golden["in.masked_image"])
    for name in golden.tensors:
        if match := re.fullmatch(r"(ddim\d+)\.decoded", name):
            yield name, network.decode(golden[f"{match[1]}.samples"])


def recognizer(golden: Golden) -> Results:
    network = load_recognizer(golden.config, golden.weights)
    if "in.ocr_lines" in golden:
        lines = golden["in.ocr_lines"]  # as the recognizer saw them, (N, 3, 48, 320)
    else:
        drawn = torch.stack([golden["in.gly_line"][i, j] for i, j in golden.lines])  # (N, 1, 80, 512)
        lines = glyph_lines(drawn)
    reading = network(lines)
    yield "ocr.logits", reading.logits
    yield "ocr.neck", reading.neck


def line_embeddings(golden: Golden) -> Results:
    network = load_glyph_embedding(golden.config, golden.weights)
    if "in.font_lines" in golden:
        given = (golden[f"in.{name}"] for name in ("line_masks", "font_lines", "line_colors"))
        yield "emb.lines", network(golden["ocr.neck"], *given)
        return
    positions, colors = (
        torch.stack([golden[k][i, j] for i, j in golden.lines]) for k in ("in.positions", "in.colors")
    )
    fonts = [font_lines(golden["in.font_hint"][i], golden["in.positions"][i, j][None]) for i, j in golden.lines]
    yield "emb.lines", network(golden["ocr.neck"], positions, torch.cat(fonts), 255 * colors)


def contexts(golden: Golden) -> Results:
    clip = load_clip(golden.config, golden.weights)
    start, end = (int(token) for token in golden["in.empty_token_ids"][0, :2])

    def encode(rows: list[list[int]]) -> Tensor:
        """Encode token lists of one number of chunks, padding included, as upstream does: (B, 77 k, c)."""
        chunks = torch.tensor([chunk_tokens(row, start, end) for row in rows])  # (B, k, 77)
        return encode_tokens(clip, chunks.flatten(0, 1)).unflatten(0, chunks.shape[:2]).flatten(1, 2)

    padded = [row[1:-1] for row in golden["in.image_token_ids"].tolist()]
    yield "cond.img", encode(padded)
    for index, row in enumerate(padded):
        yield f"cond.img.{index}", encode([row[: row.index(end)] if end in row else row])
    lines = list(golden["emb.lines"].split(golden.meta["n_lines"]))
    placeholder = golden.config.placeholder_token_id
    yield "cond.text", encode_with_lines(clip, golden["in.text_token_ids"], lines, placeholder)
    count = len(padded)
    negative = golden["in.negative_token_ids"][0, 1:-1].tolist()
    negative = negative[: negative.index(end)] if end in negative else negative
    yield "uncond.img", encode([negative]).expand(count, -1, -1)
    empty = golden["in.empty_token_ids"][:, : CAPTION_TOKENS + 2]
    yield "uncond.text", encode_with_lines(clip, empty, [lines[0][:0]], placeholder).expand(count, -1, -1)


def unet_and_solver(golden: Golden) -> Results:
    writenet = load_writenet(golden.config, golden.weights)
    control = writenet(golden.hints, golden["cond.text"])
    control_uncond = writenet(golden.hints, golden["uncond.text"])
    del writenet
    for index, residual in enumerate(control):
        yield f"writenet.{index:02d}", residual
    unet = load_unet(golden.config, golden.weights)
    given = (golden["in.noise"], golden["in.t"])
    yield "eps.cond", unet(*given, golden["cond.img"], control)
    yield "eps.uncond", unet(*given, golden["uncond.img"], control_uncond)
    yield "eps.no_control", unet(*given, golden["cond.img"], None)
    for name in golden.tensors:
        if match := re.fullmatch(r"eps\.cond\.strength([\d.]+)\.attnx([\d.]+)", name):
            weaker = tuple(float(match[1]) * residual for residual in control)
            yield name, unet(*given, golden["cond.img"], weaker, attnx_scale=float(match[2]))
        if match := re.fullmatch(r"ddim(\d+)\.samples", name):
            yield from _solve(golden, int(match[1]), unet, control, control_uncond)


def _solve(golden: Golden, steps: int, unet: UNet, control: Control, control_uncond: Control) -> Results:
    """Run upstream's DDIM: its grid, its end, contexts padded as it pads them."""
    scale = float(golden.meta["guidance_scale"])
    grid = upstream_grid(steps)

    def predict(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return unet(z, t, golden["cond.img"], control), unet(z, t, golden["uncond.img"], control_uncond)

    rollout = record_rollout(
        predict,
        golden["in.noise"],
        grid,
        guidance_scale=scale,
        keep=range(steps),
        round_states=False,
        store_predictions=True,
    )
    assert rollout.x0_cond is not None
    assert rollout.x0_uncond is not None
    # x0 is linear in eps, so guidance of predictions is the prediction under guidance.
    x0 = rollout.x0_uncond + scale * (rollout.x0_cond - rollout.x0_uncond)  # (B, S, C, h, w)
    noise = golden["in.noise"][None]  # upstream starts both lists with it
    name = f"ddim{steps}"
    yield f"{name}.timesteps", grid.timesteps.flip(0)  # upstream lists them ascending
    yield f"{name}.x_inter", rollout.states.transpose(0, 1)
    yield f"{name}.pred_x0", torch.cat([noise, x0.transpose(0, 1)])
    yield f"{name}.samples", rollout.states[:, -1]


STAGES: tuple[Callable[[Golden], Results], ...] = (vae, recognizer, line_embeddings, contexts, unet_and_solver)


def relative_error(ours: Tensor, golden: Tensor) -> float:
    """Return norm(ours - golden) / norm(golden), infinite if the shapes differ."""
    if ours.shape != golden.shape:
        return float("inf")
    difference = torch.linalg.vector_norm(ours.double() - golden.double())
    return float(difference / torch.linalg.vector_norm(golden.double()).clamp(min=1e-12))


@torch.no_grad()
def compare(path: Path, checkpoint: Path | None = None) -> Iterator[tuple[str, float]]:
    """Yield the relative error of every tensor of a golden file that is not an input.

    A tensor that nothing computes counts as infinitely wrong.
    """
    golden = read_golden(path, checkpoint)
    seen = set()
    for stage in STAGES:
        for name, ours in stage(golden):
            if name in golden.tensors:
                seen.add(name)
                yield name, relative_error(ours, golden[name])
    for name in sorted(set(golden.tensors) - seen):
        if not name.startswith(GIVEN):
            yield name, float("inf")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--checkpoint", type=Path, help="That a file of real weights was made with.")
    parsed = parser.parse_args(arguments)
    above = 0
    for path in parsed.files:
        for name, error in compare(path, parsed.checkpoint):
            bad = not error <= parsed.tolerance  # NaN is bad too
            above += bad
            print(f"{name:40s} {error:.2e}{'  above tolerance' if bad else ''}", flush=True)
    return 1 if above else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AppError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
