"""What a job runs, as plain values, and the few words that scripts and manifests share."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cluster_settings import ClusterConfig

JOBS_DIR = "jobs"
"""In a set's or a run's folder: what was submitted for it, and the jobs' logs."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""What torch, numpy and onnxruntime take their number of threads from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One command of pipeline.py that is to run in a job, or in each task of one."""

    command: str
    """"precompute", "finalize" or "train"."""
    options: tuple[str, ...]
    """The command's options and their values, as they stand on a command line; paths are absolute."""
    folder: Path
    """The set's or the run's: what the command writes."""
    jobs: Path
    """Folder of the script or manifest, and of the logs."""
    suffix: str = ""
    """Of its name."""

    @property
    def name(self) -> str:
        """The job's name: letters, digits and dashes, short enough for a pod's name with its index."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.folder.name.lower())
        return f"{self.command}-{slug}"[:40].strip("-") + self.suffix


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """How many tasks share a set."""

    num_tasks: int
    """Tasks in all."""
    throttle: int | None = None
    """Tasks that run at a time; None for any number."""

    def split(self, max_array_size: int) -> list[range]:
        """Return the tasks in arrays that a Slurm takes whose elements are numbered below `max_array_size`."""
        firsts = range(0, self.num_tasks, max_array_size)
        return [range(first, min(first + max_array_size, self.num_tasks)) for first in firsts]


def pinned(settings: ClusterConfig) -> dict[str, str]:
    """Return the variables that pin the number of threads."""
    return {name: str(settings.pinned_threads) for name in THREAD_VARIABLES}


def spell_options(options: Sequence[str]) -> list[str]:
    """Write options in lines, each with its values, quoted for a shell."""
    lines: list[list[str]] = []
    for word in options:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return [" ".join(line) for line in lines]
