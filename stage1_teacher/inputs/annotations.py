"""AnyWord's annotation files, v1.1 and v1.2b, and AnyText-benchmark's test1k.json, which has the same format.

{"data_root": "imgs", "data_list": [{"img_name": "a.png", "caption": "...", "wm_score"?: 0.1, "annotations": [
    {"polygon": [[x, y], ...], "text": "...", "language": "Latin", "valid"?: true, "color"?: [r, g, b],
     "font"?: "...", "glyph_map"?: true, "pos"?: ..., "rec_score"?: ...}]}]}

Two fields are our additions. `font`, for data that knows its fonts: a name of [inputs.fonts], or a file.
`glyph_map`: false leaves a line out of the glyph map, so that its embedding alone says what it reads.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from common.errors import DataError, reason
from common.faults import raise_disk_fault
from common.pictures import size_as_seen
from stage1_teacher.inputs.captions import describe_watermark
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
from stage1_teacher.inputs.json_entries import JsonList, read_json
from stage1_teacher.inputs.notices import Notices, say
from stage1_teacher.inputs.opening import has_changed, open_file, open_table
from stage1_teacher.inputs.table import Place, Table

ENTRY_FIELDS = ("img_name", "caption", "wm_score", "annotations")
_ID_LINE_FIELDS = ("polygon", "text", "language", "valid", "color", "font", "glyph_map")
LINE_FIELDS = (*_ID_LINE_FIELDS, "pos", "rec_score")

ANYWORD_SIDE = 512
"""AnyWord's images have this side, so its polygons can be placed without them."""
WELL_OUTSIDE = 1.25
"""Sides of its image beyond which no annotated polygon reaches."""


class Annotations:
    """The inputs of one annotation file, read one at a time.

    The order is the file's; entries whose wm_score is above the threshold are left out and do not count. How many
    these are is logged, and what else may be read otherwise than it was meant.
    """

    def __init__(
        self,
        path: Path,
        *,
        fonts: Mapping[str, Path] | None = None,
        use_images: bool = True,
        frame: int = 0,
        measure_images: bool = False,
        watermark_threshold: float = 1.0,
        ignored_fields: Collection[str] = (),
        limit: int | None = None,
        index: InputIndex | None = None,
    ) -> None:
        """Scan a file, unless an index says where its inputs lie.

        Args:
            path: the json file.
            fonts: configured font files by name; other fonts are paths relative to the file's folder.
            use_images: False leaves image files alone: generate mode, no looks as font hints.
            frame: side of the square that polygons refer to without images; 0 for AnyWord's.
            measure_images: without `use_images`: polygons refer to the image's own size where it is there.
            watermark_threshold: entries with a larger wm_score are left out.
            ignored_fields: fields that may be there and are not read.
            limit: reading may stop after so many inputs.
            index: of the set's input files.

        Raises:
            DataError: no such file, no such JSON, an unknown field, or no data_root folder.
        """
        self._path, self._use_images, self._fonts = path, use_images, fonts or {}
        self._threshold, self._ignored = watermark_threshold, frozenset(ignored_fields)
        self._side = frame or ANYWORD_SIDE
        self._reach = math.inf if frame or use_images or measure_images else self._side * WELL_OUTSIDE
        self._table = open_table(path, self._describe(), limit, self._scan, index)
        self._file = open_file(path)
        root = self._table.header["data_root"]
        self._root = self._find_root(root) if use_images else None
        self._measured = self._folder(root) if measure_images and not use_images else None
        say(self._table.header["notices"])

    def _describe(self) -> dict[str, Any]:
        """Return what decides which inputs the file has, and their ids."""
        return {
            "kind": "annotations",
            "use_images": self._use_images,
            "watermark_threshold": self._threshold if math.isfinite(self._threshold) else str(self._threshold),
            "ignored": sorted(self._ignored),
            "fonts": {name: font_sha256(font) for name, font in self._fonts.items()},
            "reach": self._reach if math.isfinite(self._reach) else None,
        }

    def _scan(self, limit: int | None) -> Table:
        table, notices = Table(), Notices(self._reach)

        def keep(number: int, entry: Any, offset: int, length: int) -> bool:
            if self._is_used(number, entry, notices):
                table.add(self._id_of(entry), offset, length, number)
            return limit is None or len(table) < limit

        entries = JsonList(
            self._path, list_field="data_list", other_fields=("data_root",), ignored=self._ignored, keep=keep
        )
        header, table.complete = entries.scan()
        table.header = {**header, "notices": notices.lines(self._path, self._threshold)}
        return table

    def _find_root(self, data_root: Any) -> Path:
        if not isinstance(data_root, str):
            raise DataError(f"{self._path}: data_root is {data_root!r:.60}, expected a folder's path")
        root = self._folder(data_root)
        if not root.is_dir():
            raise DataError(f"{self._path}: data_root {data_root!r} is no folder; looked at {root}")
        return root

    def _folder(self, data_root: Any) -> Path:
        return (self._path.parent / str(data_root)).resolve()

    def _frame(self, name: Any, where: str) -> tuple[float, float] | None:
        """Return what polygons refer to; None is the size of the image that is going to be read."""
        if self._root is not None:
            return None
        if self._measured is not None:
            try:
                return size_as_seen(locate_image(self._measured, name, where))
            except Exception:  # not there, or on hostile bytes whatever Pillow raises
                return None
        return (self._side, self._side)

    def _is_used(self, number: int, entry: Any, notices: Notices) -> bool:
        """Check an entry's fields; tells whether it is an input."""
        where = f"{self._path}: data_list[{number}]"
        if not isinstance(entry, dict):
            return True  # it is recorded as a failure when its turn comes
        check_fields(entry, ENTRY_FIELDS, where, self._ignored)
        score = entry.get("wm_score")
        left_out = is_number(score) and score > self._threshold
        lines = entry.get("annotations")
        for place, line in enumerate(lines if isinstance(lines, list) else ()):
            if isinstance(line, dict):
                at = f"{where}.annotations[{place}]"
                check_fields(line, LINE_FIELDS, at, self._ignored)
                if not left_out:
                    notices.look_at(line, at)
        notices.left_out += left_out
        return not left_out

    def _id_of(self, entry: Any) -> str:
        """Hash the fields that matter to a record."""
        if not isinstance(entry, dict):
            return make_input_id("annotation", entry)
        value = {name: entry[name] for name in ENTRY_FIELDS if name in entry}
        if not self._use_images:
            value.pop("img_name", None)
        if isinstance(entry.get("annotations"), list):
            value["annotations"] = [
                line_identity(line, _ID_LINE_FIELDS, self._fonts, self._path.parent)
                for line in entry["annotations"]
            ]
        return make_input_id("annotation" if self._use_images else "annotation without image", value)

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
        return f"{self._path.name}: data_list[{self._table.where(index)[2]}]"

    def __getitem__(self, index: int) -> Input:
        """Read the index-th input; its image is located but not opened.

        Raises:
            InputFailure: its values are wrong.
            DataError: the file changed since it was scanned.
        """
        where = self.where(index)
        try:
            entry = read_json(self._path, self._file, *self._table.where(index)[:2])
            changed = self._id_of(entry) != self.input_id(index)
        except (ValueError, RecursionError):
            changed = True
        if changed:
            raise has_changed(self._path, self._table)
        if not isinstance(entry, dict):
            raise InputFailure("bad entry", f"{where}: {entry!r:.40} is no object")
        score = entry.get("wm_score")
        check(score is None or is_number(score), "bad entry", where, "wm_score", score, "a number")
        lines = self._lines(entry.get("annotations", []), where)
        return Input(
            where=where,
            input_id=self.input_id(index),
            caption=describe_watermark(check_caption(entry.get("caption", ""), where), score),
            lines=lines,
            image=None if self._root is None else locate_image(self._root, entry.get("img_name"), where),
            frame=self._frame(entry.get("img_name"), where),
            name=entry["img_name"] if isinstance(entry.get("img_name"), str) else "",
        )

    def _lines(self, annotations: Any, where: str) -> tuple[Line, ...]:
        check(isinstance(annotations, list), "bad entry", where, "annotations", annotations, "a list")
        lines = []
        for place, annotation in enumerate(annotations):
            at = f"{where}.annotations[{place}]"
            if isinstance(annotation, dict) and annotation.get("valid") is False:
                continue  # it is in the image and is not rendered
            if not isinstance(annotation, dict) or "polygon" not in annotation:
                raise InputFailure("bad entry", f"{at}: expected an object with a polygon and a text")
            if annotation["polygon"] == []:
                continue  # upstream's way of saying "no place known"
            lines.append(read_line(annotation, self._fonts, self._path.parent, at, "bad entry"))
        return tuple(lines)


def caption_as_annotated(caption: str) -> str:
    """Take off a caption again what its watermark score put there, where it did."""
    for score in (0.0, 1.0):
        if caption.endswith(phrase := describe_watermark("", score)):
            return caption.removesuffix(phrase)
    return caption


def locate_image(root: Path, name: Any, where: str) -> Path:
    """Find an image by its name inside a folder.

    Args:
        root: the folder, resolved.
        name: relative path as written in the data.
        where: for messages.

    Returns:
        The file's real path.

    Raises:
        InputFailure: the name leads out of the folder (absolute, "..", a link), or no regular file is there.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputFailure("bad entry", f"{where}: image name is {name!r:.60}, expected a file's name")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise InputFailure("image outside its folder", f"{where}: image {name!r:.80} leads out of its folder")
    try:
        real = Path(os.path.realpath(root / name, strict=True))
        regular = stat.S_ISREG(real.stat().st_mode)
    except (OSError, ValueError) as error:
        raise_disk_fault(error, root / name)
        raise InputFailure("image missing", f"{where}: image {name!r:.80}: {reason(error)}") from None
    if not real.is_relative_to(root):
        raise InputFailure(
            "image outside its folder", f"{where}: image {name!r:.80} is a link that leads out of its folder"
        )
    if not regular:
        raise InputFailure("image missing", f"{where}: image {name!r:.80} is no regular file")
    return real
