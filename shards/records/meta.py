"""What a record says about its input in words: the `json` member."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

from common.errors import DataError
from common.files import canonical_json

MODES = ("generate", "edit")
SOURCES = ("rollout", "noised")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleMeta:
    """An input, and how it was solved. Same keys and types in every sample, never null.

    Raises:
        DataError: a field has another type or value; the message names it.
    """

    input_id: str
    """Hash of the input's content."""
    caption: str
    """Image caption as the teacher saw it, suffix included."""
    text_caption: str
    """Text caption with one `*` per line."""
    texts: tuple[str, ...]
    """The lines of text, at least one."""
    languages: tuple[str, ...]
    """Of each line, e.g. "Latin" or "Chinese"."""
    polygons: tuple[tuple[tuple[float, float], ...], ...]
    """Of each line: corners (x, y) in pixels of `size`, three or more."""
    mode: str
    """"generate" or "edit"."""
    source: str
    """"rollout" (the teacher's solves) or "noised" (data latents with noise)."""
    seeds: tuple[int, ...]
    """Seed of each rollout's noise, below 2**63."""
    size: tuple[int, int]
    """(height, width) in pixels."""
    guidance_scale: float
    """s in eps_u + s (eps_c - eps_u)."""

    def __post_init__(self) -> None:
        where = f"record {self.input_id!r}" if isinstance(self.input_id, str) else "record"
        _normalise(self, where)
        lines = len(self.texts)
        _require(len(self.input_id) > 0, where, "input_id", self.input_id, "a non-empty string")
        _require(lines > 0, where, "texts", self.texts, "at least one line")
        for field in ("languages", "polygons"):
            _require(
                len(getattr(self, field)) == lines, where, field, getattr(self, field), f"{lines}, one per line"
            )
        _require(
            all(len(p) >= 3 for p in self.polygons), where, "polygons", self.polygons, "three corners or more"
        )
        _require(self.mode in MODES, where, "mode", self.mode, "generate or edit")
        _require(self.source in SOURCES, where, "source", self.source, "rollout or noised")
        _require(len(self.seeds) > 0, where, "seeds", self.seeds, "at least one")
        _require(all(0 <= seed < 2**63 for seed in self.seeds), where, "seeds", self.seeds, "0 to 2**63 - 1")
        _require(all(side > 0 for side in self.size), where, "size", self.size, "positive height and width")

    def to_json(self) -> bytes:
        """Serialise; equal metadata gives equal bytes."""
        return canonical_json(dataclasses.asdict(self))

    @staticmethod
    def from_json(data: bytes, where: str) -> SampleMeta:
        """Parse and check the `json` member.

        Args:
            data: the member's bytes.
            where: what is read, for errors.

        Raises:
            DataError: not JSON, a key missing or unknown, or a value refused by the schema.
        """
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error})") from None
        if not isinstance(values, dict) or set(values) != _FIELDS:
            odd = sorted(_FIELDS ^ set(values)) if isinstance(values, dict) else type(values).__name__
            raise DataError(f"{where}: keys differ from the record's schema in {odd}; is it of another version?")
        try:
            return SampleMeta(**values)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


_FIELDS = {field.name for field in dataclasses.fields(SampleMeta)}


def _require(condition: bool, where: str, field: str, received: Any, expected: str) -> None:
    if not condition:
        raise DataError(f"{where}: {field} is {str(received)[:200]}, expected {expected}")


def _normalise(meta: SampleMeta, where: str) -> None:
    """Turn lists into tuples and integers into floats where the schema says so; refuse every other type."""
    for field in ("input_id", "caption", "text_caption", "mode", "source"):
        _require(_is_text(getattr(meta, field)), where, field, repr(getattr(meta, field)), "a (Unicode) string")
    for field in ("texts", "languages"):
        values = _sequence(getattr(meta, field), where, field)
        _require(all(map(_is_text, values)), where, field, values, "(Unicode) strings")
        object.__setattr__(meta, field, values)
    for field in ("seeds", "size"):
        values = _sequence(getattr(meta, field), where, field)
        _require(all(type(value) is int for value in values), where, field, values, "integers")
        object.__setattr__(meta, field, values)
    _require(len(meta.size) == 2, where, "size", meta.size, "(height, width)")
    polygons = tuple(
        tuple(_point(point, where) for point in _sequence(polygon, where, "polygons"))
        for polygon in _sequence(meta.polygons, where, "polygons")
    )
    object.__setattr__(meta, "polygons", polygons)
    object.__setattr__(meta, "guidance_scale", _number(meta.guidance_scale, where, "guidance_scale"))


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()  # a lone surrogate has no UTF-8 and could not be stored
    except UnicodeEncodeError:
        return False
    return True


def _sequence(value: Any, where: str, field: str) -> tuple[Any, ...]:
    _require(isinstance(value, list | tuple), where, field, repr(value), "a list")
    return tuple(value)


def _number(value: Any, where: str, field: str) -> float:
    ok = type(value) in (int, float) and abs(value) <= sys.float_info.max
    _require(ok, where, field, repr(value), "a finite number")
    return float(value)


def _point(value: Any, where: str) -> tuple[float, float]:
    point = _sequence(value, where, "polygons")
    _require(len(point) == 2, where, "polygons", point, "corners (x, y)")
    return _number(point[0], where, "polygons"), _number(point[1], where, "polygons")
