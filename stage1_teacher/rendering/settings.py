"""What the rendering of inputs depends on besides the inputs; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.config import Config
from stage1_teacher.inputs.fonts import configured_fonts, fallback_fonts, load_font


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderSettings:
    """What the rendering of an input depends on besides the input."""

    seed: int
    """Keys every choice, unless the input has its own."""
    size: int
    """Side of the square image, pixels."""
    font: Path
    """Draws lines that name no font."""
    fonts: Mapping[str, Path]
    """Configured fonts by name."""
    fallback_fonts: tuple[Path, ...] = ()
    """Render lines whose own font lacks characters: the first that has all of them."""
    random_fonts: bool
    font_hint_prob: float
    edit_fraction: float
    max_lines: int
    max_chars: int
    prompt_suffix: str
    needs_image: bool
    """Inputs without an image fail."""
    width: int | None = None
    """Of an image that is not square, whose height is `size`, pixels; records are square."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (H, W), pixels."""
        return self.size, self.size if self.width is None else self.width

    @staticmethod
    def from_config(config: Config) -> RenderSettings:
        """Take the settings from a configuration and check its fonts.

        Raises:
            DataError: a font file is missing or no font.
        """
        font = config.resolve(config.inputs.font, "inputs.font")
        fonts = configured_fonts(config)
        fallbacks = fallback_fonts(config, fonts)
        for path in (font, *fonts.values(), *fallbacks):
            load_font(path, 32)
        return RenderSettings(
            seed=config.precompute.seed,
            size=config.inputs.size,
            font=font,
            fonts=fonts,
            fallback_fonts=fallbacks,
            random_fonts=config.inputs.random_fonts,
            font_hint_prob=config.inputs.font_hint_prob,
            edit_fraction=config.inputs.edit_fraction,
            max_lines=config.inputs.max_lines,
            max_chars=config.inputs.max_chars,
            prompt_suffix=config.teacher.prompt_suffix,
            needs_image=config.precompute.source == "noised",
        )
