"""A picture of some records: caption, glyphs, positions, solved image, and the image that each state points at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from common.pictures import Picture, grey
from common.schedule import make_alphas_cumprod
from shards.records.record import Record

Decode = Callable[[Tensor], Sequence[Picture]]
"""The VAE's decoder: latents (B, C, h, w) float32 to B pictures."""

_MARGIN, _LINE = 4, 14
"""Pixels around a picture, and height of a line of text."""


def implied_x0(states: Tensor, timesteps: Tensor) -> Tensor:
    """Return the clean latents at which a rollout aims from each of its states.

    It is the x0 for which one DDIM step from a state lands on the next one:
    x0 = (z_e - (sigma_e / sigma_t) z_t) / (alpha_e - sigma_e alpha_t / sigma_t).

    Args:
        states: (S + 1, C, h, w) float32, the last being the solved x0.
        timesteps: (S,) int64, falling; the solve ends at alphas_cumprod = 1.

    Returns:
        (S, C, h, w).

    Source: Salimans & Ho 2022, appendix G.
    """
    cumulative = torch.cat([make_alphas_cumprod()[timesteps], torch.ones(1)]).reshape(
        -1, 1, 1, 1
    )  # (S + 1, 1, 1, 1)
    alpha, sigma = cumulative.sqrt(), (1 - cumulative).sqrt()
    ratio = sigma[1:] / sigma[:-1]
    return (states[1:] - ratio * states[:-1]) / (alpha[1:] - ratio * alpha[:-1])


def draw_contact_sheet(records: Sequence[Record], decode: Decode) -> Image.Image:
    """Draw one row a record: glyphs, positions, the solved image, the image at each state of the first rollout.

    Args:
        records: one or more of one size.
        decode: called once a record.
    """
    rows = [_draw_row(record, decode) for record in records]
    width, height = max(row.width for row in rows), sum(row.height for row in rows)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _draw_row(record: Record, decode: Decode) -> Image.Image:
    states = record.rollout_latents[0].float()  # (S + 1, C, h, w)
    if record.meta.source == "rollout":
        shown = torch.cat([states[-1:], implied_x0(states, record.rollout_timesteps)])
        names = ["solved"] + [f"x0 at {t}" for t in record.rollout_timesteps.tolist()]
    else:
        shown, names = states[-1:], ["data"]
    positions = record.positions[0].numpy()
    pictures = [
        ("glyphs", grey(record.glyphs[0].numpy() * 255)),
        ("positions", grey(positions * (255 // max(int(positions.max()), 1)))),
        *zip(names, decode(shown), strict=True),
    ]
    height, width = record.meta.size
    cell = width + 2 * _MARGIN
    row = Image.new("RGB", (cell * len(pictures), height + 2 * _LINE + 3 * _MARGIN), "white")
    draw = ImageDraw.Draw(row)
    draw.text(
        (_MARGIN, 1), _printable(f"{record.meta.input_id}  {record.meta.mode}  {record.meta.caption}"), "black"
    )
    for place, (name, pixels) in enumerate(pictures):
        left = place * cell + _MARGIN
        draw.text((left, _LINE), name, "gray")
        row.paste(Image.fromarray(pixels), (left, 2 * _LINE + _MARGIN))
    return row


def _printable(text: str) -> str:
    """Replace what the built-in font of the captions cannot draw."""
    return text.encode("latin-1", "replace").decode("latin-1")
