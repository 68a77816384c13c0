"""Which checkpoints a run has to measure, told by their lists alone; and whether one is still whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from common.faults import raise_disk_fault
from common.files import canonical_json
from stage2_student.student.adapter import EMA_DIR, LORA_DIR
from stage2_student.student.checkpoint_folders import (
    CHECKPOINTS_DIR,
    LIST_FILE,
    damage,
    list_checkpoints,
    step_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An adapter that a training run wrote."""

    step: int
    """Optimizer steps of its training."""
    checkpoint: Path
    """Its folder."""
    kind: str
    """`ema`, the average of the weights, if the run keeps one; else `lora`."""
    identity: str
    """SHA-256 over the names and hashes of its files: another training of the same step is another adapter."""

    @property
    def adapter(self) -> Path:
        """Its folder, as `sample` takes it."""
        return self.checkpoint / self.kind

    def is_gone(self) -> bool:
        """Whether training removed it meanwhile."""
        return not (self.checkpoint / LIST_FILE).exists()

    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Return name, size and time of change of its files; what is damaged may yet be mended."""
        try:
            files = sorted(path for path in self.adapter.rglob("*") if path.is_file())
            return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        except FileNotFoundError:
            return ()

    def damage(self) -> str:
        """Say what is wrong with its files, or return ""."""
        return damage(self.checkpoint, within=self.kind)


def find_candidates(run: Path) -> list[Candidate]:
    """List a run's adapters, those of few steps first; a checkpoint that cannot be read, or vanishes, is left out.

    Raises:
        MachineError: the disk failed.
    """
    found = [_read(checkpoint) for checkpoint in list_checkpoints(run / CHECKPOINTS_DIR)]
    return [candidate for candidate in found if candidate is not None]


def _read(checkpoint: Path) -> Candidate | None:
    path = checkpoint / LIST_FILE
    try:
        hashes = {name: of["sha256"] for name, of in json.loads(path.read_bytes())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not isinstance(error, FileNotFoundError):
            raise_disk_fault(error, path)
        return None
    for kind in (EMA_DIR, LORA_DIR):
        files = {name.removeprefix(f"{kind}/"): sha for name, sha in hashes.items() if name.startswith(f"{kind}/")}
        if files:
            identity = hashlib.sha256(canonical_json(files)).hexdigest()
            return Candidate(step=step_of(checkpoint), checkpoint=checkpoint, kind=kind, identity=identity)
    return None
