"""Checkpoints: folders that appear complete under their name, and are believed only by their content.

A checkpoint `step-NNNNNNNN` holds files and, written last, `checkpoint.json` with the size and SHA-256 of each.
It is written under a temporary name in the same folder, synced, and renamed. Of an older one only some files may
be left: its list then has these alone, and says which others were `pruned`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from common.errors import DataError, reason
from common.faults import naming, raise_disk_fault
from common.files import TEMPORARY_SUFFIX, canonical_json, fsync_dir, sha256_file, write_bytes_atomic

logger = logging.getLogger(__name__)

CHECKPOINTS_DIR = "checkpoints"
"""In a run's folder."""
LIST_FILE = "checkpoint.json"
PREFIX = "step-"


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step, which sorts as steps do."""
    return f"{PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def save_checkpoint(root: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint that exists complete or not at all.

    Args:
        root: the folder of checkpoints, made if missing.
        step: optimizer steps done.
        write: fills the folder that it is given.

    Returns:
        The checkpoint. One of the same step that is complete is left as it is.
    """
    root.mkdir(parents=True, exist_ok=True)
    target = root / checkpoint_name(step)
    if target.exists() and not damage(target) and not is_pruned(target):
        return target
    temporary = root / f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}"
    try:
        temporary.mkdir()
        with naming(target, temporary=temporary):
            write(temporary)
        content = {"step": step, "files": dict(_listing(temporary))}
        write_bytes_atomic(temporary / LIST_FILE, canonical_json(content))
        for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
            fsync_dir(folder)
        if target.exists():  # damaged: a folder cannot be renamed over one that is not empty
            target.rename(root / f".{target.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
        temporary.rename(target)
        fsync_dir(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _listing(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            yield name, {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def damage(checkpoint: Path, within: str = "") -> str:
    """Say what is wrong with a checkpoint's content, or return "" if it is complete.

    Args:
        checkpoint: its folder.
        within: name of a folder in it: look at nothing else. "" for all.
    """
    try:
        listed = json.loads((checkpoint / LIST_FILE).read_bytes())
        files: dict[str, dict[str, Any]] = listed["files"]
        if listed["step"] != step_of(checkpoint):
            return f"{LIST_FILE} is of step {listed['step']}"
        for name, expected in files.items():
            if within and not name.startswith(f"{within}/"):
                continue
            path = checkpoint / name
            if path.stat().st_size != expected["bytes"] or sha256_file(path) != expected["sha256"]:
                return f"{name} does not match its size and SHA-256"
    except FileNotFoundError as error:
        if Path(error.filename).name in _pruned_files(checkpoint):  # while it was read
            return damage(checkpoint, within)
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise_disk_fault(error, checkpoint)
        return f"{LIST_FILE} is unreadable ({reason(error)})"
    return ""


def is_pruned(checkpoint: Path) -> bool:
    """Tell whether only some of a checkpoint's files are left, so that no run can go on from it."""
    return bool(_pruned_files(checkpoint))


def _pruned_files(checkpoint: Path) -> frozenset[str]:
    try:
        return frozenset(json.loads((checkpoint / LIST_FILE).read_bytes()).get("pruned", ()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise_disk_fault(error, checkpoint)
        return frozenset()  # it is damaged, which `damage` says


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints by name, oldest first, whether complete or not."""
    if not root.is_dir():
        return []
    names = [p for p in root.iterdir() if p.name.startswith(PREFIX) and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(names, key=step_of)


def newest_checkpoint(root: Path, *, to_resume: bool = False) -> Path | None:
    """Return the newest checkpoint whose content is complete, or None if there is no checkpoint at all.

    Says which newer ones are damaged.

    Args:
        root: the folder of checkpoints.
        to_resume: pass over those that were pruned.

    Raises:
        DataError: there are checkpoints, and none will do.
    """
    every = list_checkpoints(root)
    found = [checkpoint for checkpoint in every if not (to_resume and is_pruned(checkpoint))]
    for checkpoint in reversed(found):
        reason = damage(checkpoint)
        if not reason:
            return checkpoint
        logger.warning("checkpoint %s is damaged and not used: %s", checkpoint, reason)
    if found:
        raise DataError(
            f"{root}: none of its {len(found)} checkpoints is complete ({found[-1].name}: {damage(found[-1])});"
            " nothing was changed: restore one from a copy, or start a new run in another --out folder"
        )
    if every:
        raise DataError(
            f"{root}: of its {len(every)} checkpoints only the adapters are left, and no run can go on from these;"
            f" restore a whole one from a copy, or start a new run with --from {every[-1]} in another --out folder"
        )
    return None


def require_complete(checkpoint: Path, *, to_resume: bool = False) -> Path:
    """Return a checkpoint that was asked for by path.

    Args:
        checkpoint: its folder.
        to_resume: refuse one that was pruned.

    Raises:
        DataError: it is missing or damaged.
    """
    if not checkpoint.is_dir() or not checkpoint.name.startswith(PREFIX):
        raise DataError(f"{checkpoint}: not a checkpoint; expected a folder named {checkpoint_name(0)} or alike")
    reason = damage(checkpoint)
    if reason:
        raise DataError(f"checkpoint {checkpoint}: {reason}; use an older one")
    if to_resume and is_pruned(checkpoint):
        raise DataError(
            f"checkpoint {checkpoint}: only its adapter is left (train.keep_checkpoints), so that no run can go on"
            f" from it; use a newer one, or start a new run with --from {checkpoint} in another --out folder"
        )
    return checkpoint


def prune(root: Path, keep: int, strip: Collection[str] = ()) -> None:
    """Remove what is older than the newest complete checkpoints, and leftovers of dead writers.

    Args:
        root: the folder of checkpoints.
        keep: complete checkpoints that stay; damaged and stripped ones do not count.
        strip: names of files; if there are any, older complete checkpoints lose these and keep the rest.
    """
    complete = 0
    for checkpoint in reversed(list_checkpoints(root)):
        if strip and is_pruned(checkpoint):
            _remove_pruned(checkpoint)  # what a dead process did not come to
        elif complete == keep and strip and _is_complete(checkpoint):
            _strip(checkpoint, strip)
        elif complete == keep:
            doomed = root / f".{checkpoint.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}"
            checkpoint.rename(doomed)  # first out of sight: a half-removed checkpoint must not bear its name
        elif _is_complete(checkpoint):
            complete += 1
    for leftover in root.glob(f".{PREFIX}*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)


def _strip(checkpoint: Path, files: Collection[str]) -> None:
    """Take files from a complete checkpoint: first from its list, so that it is never taken for whole."""
    listed = json.loads((checkpoint / LIST_FILE).read_bytes())
    rest = {name: expected for name, expected in listed["files"].items() if name not in files}
    content = {**listed, "files": rest, "pruned": sorted(files)}
    write_bytes_atomic(checkpoint / LIST_FILE, canonical_json(content))
    _remove_pruned(checkpoint)


def _remove_pruned(checkpoint: Path) -> None:
    for name in _pruned_files(checkpoint):
        (checkpoint / name).unlink(missing_ok=True)


_read: dict[Path, list[tuple[str, int, int]]] = {}
"""Checkpoints found complete, with name, size and time of change of each file: a run reads each of them once."""


def _is_complete(checkpoint: Path) -> bool:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    if _read.get(checkpoint) != stats:
        if damage(checkpoint):
            return False
        _read[checkpoint] = stats
    return True
