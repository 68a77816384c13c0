"""A picture of some records: caption, glyphs, positions, solved image, and the image that each state points at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from common.ddim import CLEAN
from common.pictures import Picture, grey
from common.schedule import alphas_at, make_alphas_cumprod, phase_target_x0
from shards.records.record import Record

Decode = Callable[[Tensor], Sequence[Picture]]
"""The VAE's decoder: latents (B, C, h, w) float32 to B pictures."""

_MARGIN, _LINE = 4, 14
"""Pixels around a picture, and height of a line of text."""


def implied_x0(states: Tensor, timesteps: Tensor) -> Tensor:
    """Return the clean latents at which a rollout aims from each of its states.

    It is the x0 for which one DDIM step from a state lands on the next one, `phase_target_x0`.

    Args:
        states: (S + 1, C, h, w) float32, the last being the solved x0.
        timesteps: (S,) int64, falling; the solve ends at alphas_cumprod = 1.

    Returns:
        (S, C, h, w).
    """
    ends = torch.nn.functional.pad(timesteps[1:], (0, 1), value=CLEAN)  # (S,)
    table = make_alphas_cumprod()
    return phase_target_x0(states[:-1], states[1:], alphas_at(table, timesteps), alphas_at(table, ends))


def make_contact_sheet(records: Sequence[Record], decode: Decode) -> Image.Image:
    """Show one row a record: glyphs, positions, the solved image, the image at each state of the first rollout.

    Args:
        records: one or more of one size.
        decode: called once a record.
    """
    rows = [_make_row(record, decode) for record in records]
    width, height = max(row.width for row in rows), sum(row.height for row in rows)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _make_row(record: Record, decode: Decode) -> Image.Image:
    states = record.rollout_latents[0].float()  # (S + 1, C, h, w)
    if record.meta.source == "rollout":
        shown = torch.cat([states[-1:], implied_x0(states, record.rollout_timesteps)])
        names = ["solved"] + [f"x0 at {t}" for t in record.rollout_timesteps.tolist()]
    elif record.meta.source == "student":
        starts = record.rollout_timesteps[::2].tolist()
        shown = torch.cat([states[-1:], implied_x0(states, record.rollout_timesteps)[::2]])
        names = ["teacher's end"] + [f"teacher from {t}" for t in starts]
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
    """Replace what the built-in font of the captions lacks."""
    return text.encode("latin-1", "replace").decode("latin-1")
