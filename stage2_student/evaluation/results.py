"""Results of an evaluation on disk: one line of JSON per image, durable batch by batch, so that it can go on.

A folder holds `layouts.json` (what was asked for, created once), for each run `runs/NAME/` with `run.json` (who
sampled, created once and compared), `results.jsonl` and `images/`, and in `solve/` the teacher's own solves that
runs are measured against.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from common.differences import require_same
from common.errors import DataError, reason
from common.faults import raise_disk_fault
from common.files import canonical_json, create_once
from common.jsonl import LineWriter, read_lines
from common.layouts import Layout, hash_layouts
from common.toml import describe
from stage2_student.evaluation.endpoint import Distance
from stage2_student.evaluation.reading import LineResult

LAYOUTS_FILE, RUN_FILE, RESULTS_FILE = "layouts.json", "run.json", "results.jsonl"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """One sampled image, read."""

    layout_id: str
    sample: int
    """Index among the images of one layout."""
    lines: tuple[LineResult, ...]
    seconds: float
    """Time to sample it: its batch's, shared out; encoding of prompts and reading are not in it."""
    unet_evaluations: float
    """UNet calls for it, counted; a guided step has two."""
    writenet_evaluations: float
    """WriteNet calls for it, counted."""
    image: str
    """File name in `images/`, empty if the image was not kept."""
    ground: float | None = None
    """Mean colour difference (Delta E*ab) from the true image outside the lines; None where not comparable."""
    distance: Distance | None = None
    """From the teacher's own solve of the same noise; None where nothing was sampled, or it was not measured."""


_LAYOUTS, _RESULT = TypeAdapter(list[Layout]), TypeAdapter(ImageResult)


def check_or_create(path: Path, content: Mapping[str, Any], what: str) -> None:
    """Write a description once, or compare with the one that is there.

    Raises:
        DataError: the existing one differs; the differences are named.
    """
    # Through JSON: a tuple given and a list read back are the same.
    wanted: dict[str, Any] = json.loads(canonical_json({"format": FORMAT, **content}))
    path.parent.mkdir(parents=True, exist_ok=True)
    if create_once(path, canonical_json(wanted)):
        return
    remedy = "give another --out, or the earlier settings to go on"
    require_same(wanted, read_description(path), f"{path}: {what} differs", remedy)


def read_description(path: Path, expected: str = "expected a JSON object") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: of the file.
        expected: ends the error, and may say what to do.

    Raises:
        DataError: it is missing or not one.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected the folder of an evaluation") from None
    except (OSError, ValueError) as error:
        raise_disk_fault(error, path)
        raise DataError(f"{path}: not readable as JSON ({reason(error)}); {expected}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: received a JSON {type(value).__name__}, {expected}")
    return value


def save_layouts(folder: Path, layouts: Iterable[Layout], settings: Mapping[str, Any]) -> None:
    """Describe what an evaluation folder asks for, or check that it is the same as before.

    Args:
        folder: of the evaluation.
        layouts: in order.
        settings: whatever else all its runs share (seed, samples per layout, judge ...).

    Raises:
        DataError: the folder was made with others.
    """
    layouts = list(layouts)
    content = {
        "settings": dict(settings),
        "count": len(layouts),
        "layouts_hash": hash_layouts(layouts),
        "layouts": [dataclasses.asdict(layout) for layout in layouts],
    }
    check_or_create(folder / LAYOUTS_FILE, content, "what is evaluated")


def load_layouts(folder: Path) -> tuple[list[Layout], dict[str, Any]]:
    """Return a folder's layouts and shared settings.

    Raises:
        DataError: the folder is not an evaluation's.
    """
    content = read_description(folder / LAYOUTS_FILE)
    try:
        return _LAYOUTS.validate_python(content["layouts"]), dict(content["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / LAYOUTS_FILE}: not the layouts of an evaluation ({reason(error)})") from None


def load_results(path: Path) -> list[ImageResult]:
    """Read a run's results; a last line that a crash tore is left out.

    Raises:
        DataError: another line is damaged.
    """
    results = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            results.append(_RESULT.validate_json(line))
        except ValidationError as error:
            raise DataError(
                f"{path}, line {number}: damaged ({describe(error)}); remove the line, and evaluate again"
            ) from None
    return results


def open_results(path: Path) -> LineWriter[ImageResult]:
    """Open a run's results to go on with; what `append` returned from is on disk."""
    return LineWriter(path, encode=lambda result: canonical_json(dataclasses.asdict(result)), durable=True)


def slug(label: str) -> str:
    """Make a folder's name of a run's label."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "run"
