"""What the benchmarks share: options, the embedded teacher's data for a network of any size, waiting for a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from common.config import PROJECT_ROOT, Config, load_config
from common.scripts import make_parser
from stage1_teacher.inputs.files import open_inputs
from stage1_teacher.rendering.rendered_input import RenderedInput, render_input
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.tiny.scene import FONT_FOLDER, FONTS


def bench_parser(text: str | None) -> argparse.ArgumentParser:
    """Return a parser of a benchmark's options, --config and --set among them; `text` is its module's."""
    parser = make_parser(text)
    parser.add_argument("--config", type=Path, default=PROJECT_ROOT / "configs" / "tiny.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser


def read_config(path: Path, overrides: list[str]) -> Config:
    """Read a configuration, and let it know the fonts that the data's lines name."""
    config = load_config(path, overrides)
    fonts = {Path(font).stem: str(FONT_FOLDER / font) for font in FONTS}
    return config.replace(inputs=config.inputs.replace(fonts=fonts))


def render_inputs(config: Config, annotations: Path, count: int) -> list[RenderedInput]:
    """Draw the first inputs of a file, at most `count`."""
    settings = RenderSettings.from_config(config)
    inputs = open_inputs([annotations], [], config.inputs, settings.fonts, count)
    return [render_input(inputs[index], settings) for index in range(len(inputs))]


def finish() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
