"""True images of known text, sampled with real fonts by nothing of ours: what the measurement must read."""

from __future__ import annotations

import math
import random

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from common.config import PROJECT_ROOT
from common.layouts import Layout, Line

FONTS = [
    PROJECT_ROOT / "models" / "fonts" / name
    for name in (
        "DejaVuSans.ttf",
        "DejaVuSans-Bold.ttf",
        "Roboto-Bold.ttf",
        "SourceSansPro-Bold.otf",
        "SourceSerifPro-Bold.otf",
    )
]
WORDS = tuple(
    word
    for line in (
        "OPEN SALE COFFEE Hello Market Garden music River 2024 1999 HOTEL bakery School Station EXIT light",
        "365 Studio PIZZA travel house Books Ocean Bridge KITCHEN Pepper 8472 THEATRE number",
    )
    for word in line.split()
)
PALETTE = [(16, 16, 16), (240, 240, 240), (214, 36, 36), (24, 140, 56), (36, 64, 210), (244, 216, 40)]
OVERSAMPLING = 3


def draw_text_image(
    random_: random.Random, side: int, heights: tuple[int, int], angle: float = 0, stacked: bool = False
) -> tuple[NDArray[np.uint8], Line]:
    """Draw one word on a coloured ground.

    Args:
        random_: makes all choices.
        side: of the square image, pixels.
        heights: least and largest font size, pixels.
        angle: of the line, degrees clockwise.
        stacked: upright characters one below the other.

    Returns:
        The image, (side, side, 3) uint8, and the line with its polygon, begun at any of its corners.
    """
    ground, ink = random_.sample(PALETTE, 2)
    while math.dist(ground, ink) < 150:
        ground, ink = random_.sample(PALETTE, 2)
    large = side * OVERSAMPLING
    while True:
        text = random_.choice(WORDS)
        text = text.upper() if stacked else text
        font = ImageFont.truetype(str(random_.choice(FONTS)), random_.randint(*heights) * OVERSAMPLING)
        coverage = _stack(text, font) if stacked else _write(text, font)
        height, width = coverage.shape
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        reach = abs(width * cos) + abs(height * sin), abs(width * sin) + abs(height * cos)
        if max(reach) < large - 12:
            break
    rotation = np.array([[cos, -sin], [sin, cos]])
    centre = np.array([random_.uniform(length / 2 + 6, large - length / 2 - 6) for length in reach])
    offset = centre - rotation @ [width / 2, height / 2]
    turned = cv2.warpAffine(coverage, np.column_stack([rotation, offset]), (large, large), flags=cv2.INTER_CUBIC)
    share = cv2.resize(turned, (side, side), interpolation=cv2.INTER_AREA)[..., None] / 255
    image = np.rint(np.array(ground) * (1 - share) + np.array(ink) * share).astype(np.uint8)
    corners = (np.array([[0, 0], [width, 0], [width, height], [0, height]]) @ rotation.T + offset) / OVERSAMPLING
    polygon = np.roll(corners, random_.randrange(4), axis=0)
    color = (float(ink[0]), float(ink[1]), float(ink[2]))
    return image, Line(text=text, polygon=tuple((float(x), float(y)) for x, y in polygon), color=color)


def draw_layouts(
    key: str,
    count: int,
    side: int,
    heights: tuple[int, int],
    angles: tuple[float, float] = (0, 0),
    stacked: bool = False,
) -> tuple[list[NDArray[np.uint8]], list[Layout]]:
    """Draw many images; returns them and their layouts of one line each."""
    random_ = random.Random(key)
    images, layouts = [], []
    for i in range(count):
        image, line = draw_text_image(random_, side, heights, random_.uniform(*angles), stacked)
        images.append(image)
        layouts.append(Layout(layout_id=f"{key}-{i:03d}", size=(side, side), lines=(line,), name=f"word{i:03d}"))
    return images, layouts


def _write(text: str, font: ImageFont.FreeTypeFont) -> NDArray[np.uint8]:
    left, top, right, bottom = (int(value) for value in font.getbbox(text))
    margin = 2 * OVERSAMPLING
    coverage = Image.new("L", (right - left + 2 * margin, bottom - top + 2 * margin), 0)
    ImageDraw.Draw(coverage).text((margin - left, margin - top), text, font=font, fill=255)
    return np.asarray(coverage)


def _stack(text: str, font: ImageFont.FreeTypeFont) -> NDArray[np.uint8]:
    cells = [_write(character, font) for character in text]
    width = max(cell.shape[1] for cell in cells)
    padded = [
        np.pad(
            cell, ((0, 0), ((width - cell.shape[1]) // 2, width - cell.shape[1] - (width - cell.shape[1]) // 2))
        )
        for cell in cells
    ]
    return np.concatenate(padded)
