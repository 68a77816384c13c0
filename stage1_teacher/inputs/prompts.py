"""Prompts: inputs that need no image, one JSON object a line.

    {"caption": "a shop front", "lines": [{"text": "OPEN", "box": [76, 75, 436, 165], "color": "#dc1e28"}]}

| field | meaning |
| --- | --- |
| caption | what the image shows |
| lines | each with text, and box [x0, y0, x1, y1] or polygon [[x, y], ...]; see below |
| size | side in pixels of the square that boxes refer to; default `inputs.size` |
| seed | keys this prompt's noise; default `precompute.seed` |
| image | file beside the prompts file, for font hints and edit mode |
| mode | "generate" or "edit"; default: `inputs.edit_fraction` decides where there is an image |

A line may also have color, font, language, and glyph_map: false leaves it out of the glyph map, so that its
embedding alone says what it reads.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.faults import naming
from stage1_teacher.inputs.annotations import locate_image
from stage1_teacher.inputs.fonts import font_sha256, line_identity, read_line
from stage1_teacher.inputs.index import InputIndex
from stage1_teacher.inputs.input import (
    Input,
    InputFailure,
    Line,
    check,
    check_caption,
    check_fields,
    is_number,
    make_input_id,
)
from stage1_teacher.inputs.json_entries import read_json
from stage1_teacher.inputs.opening import has_changed, open_file, open_table
from stage1_teacher.inputs.table import Place, Table

PROMPT_FIELDS = ("caption", "lines", "size", "seed", "image", "mode")
LINE_FIELDS = ("text", "box", "polygon", "color", "font", "language", "glyph_map")


class Prompts:
    """The inputs of one JSONL file; blank lines do not count."""

    def __init__(
        self,
        path: Path,
        *,
        size: int,
        fonts: Mapping[str, Path],
        use_images: bool = True,
        ignored_fields: Collection[str] = (),
        limit: int | None = None,
        index: InputIndex | None = None,
    ) -> None:
        """Scan a file, unless an index says where its inputs lie.

        Args:
            path: the JSONL file.
            size: side in pixels that boxes refer to where a prompt does not say.
            fonts: configured font files by name.
            use_images: False leaves image files alone.
            ignored_fields: fields that may be there and are not read.
            limit: reading may stop after so many inputs.
            index: of the set's input files.

        Raises:
            DataError: no such file, a line is no JSON object, or has an unknown field.
        """
        self._path, self._size, self._fonts, self._use_images = path, float(size), fonts, use_images
        self._ignored = frozenset(ignored_fields)
        self._file = open_file(path)
        settings = {
            "kind": "prompts",
            "use_images": use_images,
            "ignored": sorted(self._ignored),
            "fonts": {name: font_sha256(font) for name, font in fonts.items()},
        }
        self._table = open_table(path, settings, limit, self._scan, index)

    def _scan(self, limit: int | None) -> Table:
        folder, offset, table = self._path.parent.resolve(), 0, Table()
        with naming(self._path), open_file(self._path) as file:
            for number, line in enumerate(file, start=1):
                if limit is not None and len(table) >= limit:
                    table.complete = False
                    break
                if line.strip():
                    prompt = self._parse(line, f"{self._path}:{number}")
                    input_id = prompt_id(prompt, self._fonts, folder, self._use_images)
                    table.add(input_id, offset, len(line), number)
                offset += len(line)
        return table

    def _parse(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            prompt = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); expected one object a line") from None
        if not isinstance(prompt, dict):
            raise DataError(f"{where}: {prompt!r:.40} is no object")
        check_fields(prompt, PROMPT_FIELDS, where, self._ignored)
        lines = prompt.get("lines")
        for place, item in enumerate(lines if isinstance(lines, list) else ()):
            if isinstance(item, dict):
                check_fields(item, LINE_FIELDS, f"{where}: lines[{place}]", self._ignored)
        return prompt

    @property
    def table(self) -> Place:
        """Where the inputs lie in the file."""
        return self._table

    def __len__(self) -> int:
        return len(self._table)

    def input_id(self, index: int) -> str:
        """Return the index-th input's id, without reading the file."""
        return self._table.digest(index).hex()

    def where(self, index: int) -> str:
        """Name the index-th input for messages."""
        return f"{self._path.name}:{self._table.where(index)[2]}"

    def __getitem__(self, index: int) -> Input:
        """Read the index-th prompt.

        Raises:
            InputFailure: its values are wrong.
            DataError: the file changed since it was scanned.
        """
        offset, length, _number = self._table.where(index)
        try:
            content = parse_prompt(
                read_json(self._path, self._file, offset, length),
                where=self.where(index),
                size=self._size,
                fonts=self._fonts,
                folder=self._path.parent.resolve(),
                use_images=self._use_images,
            )
        except (ValueError, AttributeError):
            content = None
        if content is None or content.input_id != self.input_id(index):
            raise has_changed(self._path, self._table)
        return content


def prompt_id(prompt: Mapping[str, Any], fonts: Mapping[str, Path], folder: Path, use_images: bool) -> str:
    """Hash a prompt; a font counts by its file's bytes, not by its name or path."""
    value = {name: prompt[name] for name in PROMPT_FIELDS if name in prompt}
    if not use_images:
        value.pop("image", None)
    if isinstance(prompt.get("lines"), list):
        value["lines"] = [line_identity(line, LINE_FIELDS, fonts, folder) for line in prompt["lines"]]
    return make_input_id("prompt" if use_images else "prompt without image", value)


def parse_prompt(
    prompt: Mapping[str, Any],
    *,
    where: str,
    size: float,
    fonts: Mapping[str, Path],
    folder: Path,
    use_images: bool = True,
) -> Input:
    """Check a prompt's values.

    Args:
        prompt: the JSON object.
        where: file and line, for messages.
        size: side in pixels that boxes refer to where the prompt does not say.
        fonts: configured font files by name.
        folder: resolved; the prompt's image lies inside it, and paths of fonts are relative to it.
        use_images: False leaves the image alone.

    Raises:
        InputFailure: a value is wrong.
    """
    lines = prompt.get("lines", [])
    check(isinstance(lines, list), "bad prompt", where, "lines", lines, "a list")
    frame = prompt.get("size", size)
    check(is_number(frame) and frame >= 1, "bad prompt", where, "size", frame, "pixels, at least 1")
    seed = prompt.get("seed")
    check(seed is None or type(seed) is int, "bad prompt", where, "seed", seed, "an integer")
    image = prompt.get("image") if use_images else None
    mode = prompt.get("mode")
    known = mode in (None, "generate", "edit") and not (mode == "edit" and image is None)
    check(known, "bad prompt", where, "mode", mode, '"generate", or "edit" with an image')
    return Input(
        where=where,
        input_id=prompt_id(prompt, fonts, folder, use_images),
        caption=check_caption(prompt.get("caption"), where),
        lines=tuple(_line(line, f"{where}: lines[{i}]", fonts, folder) for i, line in enumerate(lines)),
        image=None if image is None else locate_image(folder, image, where),
        frame=(float(frame), float(frame)),
        mode=mode,
        seed=seed,
    )


def _line(line: Any, where: str, fonts: Mapping[str, Path], folder: Path) -> Line:
    if not isinstance(line, dict):
        raise InputFailure("bad prompt", f"{where}: {line!r:.40} is no object")
    if ("box" in line) == ("polygon" in line):
        raise InputFailure("bad polygon", f"{where}: expected either a box or a polygon")
    return read_line(line, fonts, folder, where, "bad prompt")
