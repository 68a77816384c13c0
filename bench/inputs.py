"""Configurations and inputs of the benchmarks: the embedded teacher's data, for a network of any size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from common.config import Config, load_config
from stage1_teacher.tiny.scene import FONT_FOLDER, FONTS


def read_config(path: Path, overrides: list[str]) -> Config:
    """Read a configuration, and let it know the fonts that the data's lines name."""
    config = load_config(path, overrides)
    fonts = {Path(font).stem: str(FONT_FOLDER / font) for font in FONTS}
    return replace(config, teacher=replace(config.teacher, fonts=fonts))
