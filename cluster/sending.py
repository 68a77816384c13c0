"""Handing jobs to sbatch and kubectl, by their own commands."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from common.errors import MachineError, UsageError

DEFAULT_MAX_ARRAY_SIZE = 1001
"""Slurm's own, for where no Slurm can be asked."""
_AWAY = re.compile(
    r"unable to contact|connect(ion)? (failure|refused|to the server|timed out)|timed? ?out|try again|no route"
    r"|communication|no such host|failed to load config|configuration source",
    re.IGNORECASE,
)
"""What sbatch and kubectl say where nobody answers."""


def dependent(job_id: str, condition: str) -> list[str]:
    """Return sbatch's options for a job that waits for another, and is cancelled where it would wait for ever.

    Args:
        job_id: of the other.
        condition: "afterok", or "afterany" for whatever becomes of it.
    """
    return [f"--dependency={condition}:{job_id}", "--kill-on-invalid-dep=yes"]


def call_sbatch(script: Path, options: Sequence[str] = ()) -> str:
    """Submit a script.

    Args:
        script: its file.
        options: of sbatch, beside those in the script.

    Returns:
        The job's id.

    Raises:
        UsageError: Slurm refused it, or there is no sbatch here.
        MachineError: Slurm does not answer.
    """
    said = _call(["sbatch", "--parsable", *options, str(script)])
    return said.strip().partition(";")[0]  # ID or ID;CLUSTER


def call_kubectl(manifest: Path, namespace: str) -> str:
    """Create what a manifest says; returns what kubectl says. Raises as `call_sbatch`."""
    chosen = ["--namespace", namespace] if namespace else []
    return _call(["kubectl", *chosen, "create", "--filename", str(manifest)]).strip()


def ask_max_array_size() -> int | None:
    """Return this Slurm's MaxArraySize: elements are numbered below it. None where no Slurm answers."""
    try:
        said = _call(["scontrol", "show", "config"])
    except (UsageError, MachineError):
        return None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", said, re.MULTILINE)
    return int(found[1]) if found else None


def _call(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError(
            f"{command[0]}: no such program here; run submit where jobs can be submitted, or look at what it would"
            " send with --dry-run"
        ) from None
    if done.returncode:
        said = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip()) or "it says nothing"
        if _AWAY.search(said):
            raise MachineError(f"{command[0]} failed: {said}; submit again when it answers")
        raise UsageError(f"{command[0]} refused it (exit code {done.returncode}): {said}; mend [cluster]")
    return done.stdout
