"""The files that `sample` writes: a PNG for each image, which says what it is, and a grid of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from both_stages.sampling import (
    ImageSampler,
    Prompt,
    RecordOf,
    What,
    read_prompt,
    read_prompts,
    require_size,
)
from common.config import Config
from common.errors import UsageError
from common.files import canonical_json, require_suffix
from common.pictures import Picture, beside, in_grid, write_png


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Return (W, H) of "768x512".

    Raises:
        UsageError: it is no such text.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)[xX](\d+)", text.strip())
    if match is None:
        raise UsageError(f"--size {text}: expected WIDTHxHEIGHT in pixels, e.g. 768x512")
    return int(match[1]), int(match[2])


def check_outputs(out: Path, grid: Path | None, *, folder: bool) -> None:
    """Refuse names of outputs before anything is loaded.

    Args:
        out: the PNG file, or the folder of many.
        grid: the PNG file of all.
        folder: whether `out` is a folder.

    Raises:
        UsageError: a name says another format, or a file is where a folder should be, or the other way about.
    """
    if not folder:
        require_suffix(out, ".png")
    if grid is not None:
        require_suffix(grid, ".png", option="--grid")
    if out.is_file() if folder else out.is_dir():
        found, expected = ("file", "folder, for --prompts") if folder else ("folder", "PNG file")
        raise UsageError(f"--out {out}: is a {found}, expected a {expected}; give another --out")


def sample_files(
    config: Config,
    asked: Prompt | RecordOf | Path,
    out: Path,
    *,
    adapter: Path | None,
    steps: int | None = None,
    grid: Path | None = None,
    size: str | None = None,
    **how: Any,
) -> Iterator[Path]:
    """Do what `sample` was asked for; all that can be checked before the networks are loaded is.

    Args:
        config: see `ImageSampler`, as for adapter and steps.
        asked: a prompt, a record, or a prompts file, to sample each line of it.
        out: the PNG file, numbered if there are more; of a prompts file a folder.
        adapter: of the student; None for the teacher.
        steps: of the teacher.
        grid: a PNG file of all images; None for none.
        size: "WxH".
        **how: seed, num_images and compare of `ImageSampler.sample`.

    Raises:
        UsageError: an argument is wrong, or they do not fit together.
        DataError: a file is wrong.
    """
    folder = isinstance(asked, Path)
    check_outputs(out, grid, folder=folder)
    pixels = parse_size(size)
    require_size(config, pixels)
    whats: Sequence[What] = [asked] if isinstance(asked, RecordOf) else []
    if isinstance(asked, Path):
        whats = read_prompts(config, asked, pixels)
    elif isinstance(asked, Prompt):
        whats = [read_prompt(config, asked, pixels)]
    sampler = ImageSampler(config, adapter=adapter, steps=steps)
    return write_samples(sampler, whats, out, folder=folder, grid=grid, size=pixels, **how)


def write_samples(
    sampler: ImageSampler,
    asked: Sequence[What],
    out: Path,
    *,
    folder: bool,
    grid: Path | None = None,
    seed: int | None = None,
    num_images: int = 1,
    compare: bool = False,
    size: tuple[int, int] | None = None,
) -> Iterator[Path]:
    """Sample and write one after the other; yields each file when it is there.

    Args:
        sampler: who samples.
        asked: what to sample, `num_images` of each.
        out: the PNG file, numbered if there are more; or a folder.
        folder: whether `out` is a folder, of one PNG for each of `asked`, likewise numbered.
        grid: a PNG file of all images; None for none.
        seed: see `ImageSampler.sample`, as for the others.
        num_images: of each.
        compare: the teacher's picture to the left of each.
        size: (W, H).
    """
    tiles: list[Picture] = []
    texts: list[dict[str, str]] = []
    digits = max(4, len(str(len(asked) - 1)))
    for place, what in enumerate(asked):
        samples = sampler.sample(what, seed=seed, num_images=num_images, compare=compare, size=size)
        first = out / f"{place:0{digits}}.png" if folder else out
        for number, picture in enumerate(samples.pictures):
            path = first if num_images == 1 else first.with_stem(f"{first.stem}_{number}")
            shown = picture if samples.teacher is None else beside([samples.teacher[number], picture])
            write_png(path, shown, samples.texts[number])
            yield path
            if grid is not None:
                tiles.append(shown)
                texts.append(samples.texts[number])
    if grid is not None:
        columns = num_images if len(asked) > 1 and num_images > 1 else math.ceil(math.sqrt(len(tiles)))
        write_png(grid, in_grid(tiles, columns), _together(texts))
        yield grid


def _together(texts: Sequence[dict[str, str]]) -> dict[str, str]:
    """Say of a grid what its images say of themselves: the model once, the rest as JSON lists in their order."""
    lists = {key: canonical_json([text[key] for text in texts]).decode().strip() for key in ("prompt", "seed")}
    return {**lists, "model": texts[0]["model"]}
