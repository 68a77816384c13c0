"""What `export` composes: a student's weights in some format, and the model card beside them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import Config
from common.errors import UsageError
from common.faults import naming
from common.files import fsync_dir, read_bytes, temporary_path, write_bytes_atomic
from stage2_student.evaluation.summary import summarise
from stage2_student.evaluation.text_table import table_cells
from stage2_student.student.adapter import Card, adapter_files, find_adapter, load_tensors, read_card, save_adapter
from stage2_student.student.export import FORMATS, export
from stage2_student.student.model_card import (
    CARD_NAME,
    SAMPLES_DIR,
    Measured,
    base_name,
    render_card,
    student_mark,
)

logger = logging.getLogger(__name__)

FOLDERS = ("adapter", "diffusers-pipeline")
"""Formats that are a folder."""
KINDS = (*FORMATS, *FOLDERS)
_MOST_SAMPLES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """What was written."""

    files: tuple[Path, ...]
    """The one that was asked for, what belongs to it, and the card."""
    modules: int
    """That are adapted."""
    card: Card
    """How to sample it."""


def hand_on(
    config: Config, adapter: Path, kind: str, out: Path, *, evaluation: Path | None = None, base: str | None = None
) -> Handed:
    """Export a student with its model card.

    Args:
        config: its [model] section; of "diffusers-pipeline" inputs and teacher too, for the example in it.
        adapter: a run's folder, a checkpoint, an adapter's folder, or an exported LoRA.
        kind: one of KINDS.
        out: a file, or of FOLDERS a folder that is not there yet.
        evaluation: a folder that `evaluate` wrote: its table and some images go into the card.
        base: name of the base model on a hub; None for the released one's or the checkpoint's.

    Raises:
        UsageError: `out` is there already, or its name says another format.
        DataError: the adapter or the evaluation is unreadable, or of another base.
    """
    measured = None if evaluation is None else read_measured(evaluation)
    card = read_card(find_adapter(adapter))
    base = base or base_name(config.as_dict()["model"] if not card.config else card.config.get("model", {}))
    if kind not in FOLDERS:
        done = export(config, adapter, kind, out)
        names = [path.name for path in done.files]
        text = render_card(done.card, kind, files=names, base=base, measured=measured)
        written = _card_beside(out, text, student_mark(done.card), measured)
        return Handed(files=(*done.files, written), modules=done.modules, card=done.card)
    if kind == "adapter":
        tensors = load_tensors(find_adapter(adapter))

        def fill(folder: Path) -> None:
            save_adapter(folder, tensors, card)
            text = render_card(card, kind, files=sorted(adapter_files(folder)), base=base, measured=measured)
            _write_card(folder / CARD_NAME, text, measured)

        count = len(tensors) // 2
    else:
        from both_stages.diffusers_folder import fill_folder

        count = 0

        def fill(folder: Path) -> None:
            nonlocal count
            count = fill_folder(config, adapter, folder, base, measured)

    write_folder(out, fill)
    return Handed(files=(out,), modules=count, card=card)


def write_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder that exists complete or not at all.

    Args:
        out: the folder; it may be there if it is empty.
        fill: fills the folder that it is given.

    Raises:
        UsageError: it is there already, and not empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"--out {out}: is there already; give a folder that is not, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(out)
    try:
        temporary.mkdir()
        with naming(out, temporary=temporary):
            fill(temporary)
            for file in (path for path in temporary.rglob("*") if path.is_file()):
                file.chmod(0o644)  # safetensors makes its files private
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
            fsync_dir(folder)
        temporary.rename(out)
        fsync_dir(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_measured(evaluation: Path) -> Measured:
    """Read an evaluation's table, and some of the images that it kept of its students.

    Raises:
        DataError: it is no evaluation, or none of its runs is complete.
    """
    summary = summarise(evaluation)
    head, *rows = table_cells(summary)
    samples: dict[str, bytes] = {}
    for run in summary.runs:
        kept = sorted((evaluation / "runs" / run.folder / "images").glob("*.png")) if run.kind == "student" else []
        for image in kept[:_MOST_SAMPLES]:
            samples[f"{run.folder}-{image.name}"] = read_bytes(image)
    note = (
        f"{summary.lines} lines of text of {summary.layouts} held-out layouts, read by a recognizer that"
        " conditions no model; 95 % intervals in brackets. The same layouts and noise for all."
    )
    return Measured(note=note, head=head, rows=rows, samples=samples)


def _write_card(path: Path, text: str, measured: Measured | None) -> None:
    for name, data in (measured.samples if measured else {}).items():
        (path.parent / SAMPLES_DIR).mkdir(exist_ok=True)
        write_bytes_atomic(path.parent / SAMPLES_DIR / name, data)
    write_bytes_atomic(path, text.encode())


def _card_beside(out: Path, text: str, mark: str, measured: Measured | None) -> Path:
    """Write the card beside an exported file; a README.md of anything else keeps its name."""
    path = out.with_name(CARD_NAME)
    if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
        path = out.with_suffix(".md")
        logger.warning("%s is of something else and stays: the card is %s", out.with_name(CARD_NAME), path.name)
    _write_card(path, text, measured)
    return path
