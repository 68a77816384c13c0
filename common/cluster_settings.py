"""The section [cluster]: what `submit` asks a cluster for. Threads aside, none of it decides a result."""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, model_validator

from common.sections import Names
from common.toml import Count, Section, require

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_MEMORY = re.compile(r"\d+[KMGT]")
_EXTRA_SECONDS = 60.0
"""For what comes after the last batch: reading back, committing, ending the processes."""


def _spell_time(value: Any) -> Any:
    """Take what TOML makes of a time without quotation marks: 04:00:00, or a number of minutes."""
    if isinstance(value, datetime.time):
        return value.isoformat()
    return str(value) if type(value) is int else value


Time = Annotated[str, BeforeValidator(_spell_time)]


def parse_time(text: str) -> int:
    """Return the seconds of a time as Slurm writes it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    found = _TIME.fullmatch(text)
    assert found is not None, text
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


class ClusterConfig(Section):
    """Where `submit` sends jobs, and what each gets."""

    system: Literal["slurm", "kubernetes"] = "slurm"
    """"slurm" (sbatch) or "kubernetes" (kubectl)."""
    gpus: Annotated[int, Field(ge=0, le=1)] = 1
    """GPUs of each process, 1 or 0: a task of `precompute` and a rank of `train` use one at most."""
    gpu_type: str = ""
    """Slurm: a gres type such as "h100"; empty for any."""
    cpus: Count = 4
    """Cores of each process."""
    threads: NonNegativeInt = 0
    """Threads that a process computes with, which decide the last bits of records; 0 for `cpus`."""
    memory: str = "32G"
    """Memory of each process, a number with K, M, G or T."""
    batch_seconds: PositiveFloat = 60.0
    """Longest batch of `precompute`, or longest step of `train` with its checkpoint. A job is asked to stop this
    long, and 60 s, ahead of its limit."""
    train_nodes: Count = 1
    """Slurm: nodes that `train` runs on. Kubernetes trains in one pod."""
    train_processes: Count = 1
    """Ranks of `train` on each node."""

    time: Time = "04:00:00"
    """Slurm: limit of each job, as sbatch takes it. An element that meets it goes on in a new slice."""
    max_requeues: Count = 20
    """Slurm: slices after which a job that still was stopped by a signal is given up."""
    partition: str = ""
    """Slurm: of the jobs; empty for the default."""
    cpu_partition: str = ""
    """Slurm: of `finalize`, which needs no GPU; empty for `partition`."""
    account: str = ""
    """Slurm: who pays; empty for the default."""
    qos: str = ""
    """Slurm: quality of service; empty for the default."""
    options: Names = ()
    """Slurm: further options of sbatch, each as it stands behind #SBATCH: "--constraint=ib"."""
    modules: Names = ()
    """Slurm: environment modules to load, in order."""
    setup: Names = ()
    """Slurm: lines of shell that come before the command."""
    python: str = ""
    """Interpreter of the jobs. Empty for the one that runs `submit`; in a container and a pod "python"."""
    container: str = ""
    """Slurm: image that the command runs in: a file or URL that the runtime takes."""
    container_runtime: Literal["apptainer", "pyxis"] = "apptainer"
    """Slurm: "apptainer" (apptainer exec) or "pyxis" (srun --container-image)."""
    container_mounts: Names = ()
    """Slurm: further folders in the container, FOLDER or FROM:TO. The project's own is always there."""

    image: str = ""
    """Kubernetes: the container image, built from the project's Dockerfile."""
    namespace: str = ""
    """Kubernetes: of the jobs; empty for kubectl's."""
    volumes: dict[str, str] = Field(default_factory=dict)
    """Kubernetes: folder in the pods -> PersistentVolumeClaim that is mounted there."""
    secret: str = ""
    """Kubernetes: Secret whose values become environment variables, e.g. a bucket's credentials."""
    service_account: str = ""
    """Kubernetes: of the pods; empty for the namespace's default."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Kubernetes: labels that a node must have, e.g. of a kind of GPU."""
    gpu_resource: str = "nvidia.com/gpu"
    """Kubernetes: what a GPU is called."""
    retries: NonNegativeInt = 6
    """Kubernetes: times that an index is tried again, evictions not counted."""

    @property
    def warning_seconds(self) -> int:
        """How long ahead of its limit a job is asked to stop."""
        return int(-(-(self.batch_seconds + _EXTRA_SECONDS) // 1))

    @property
    def time_seconds(self) -> int:
        """The limit of each job."""
        return parse_time(self.time)

    @property
    def pinned_threads(self) -> int:
        """Threads that a process computes with."""
        return self.threads or self.cpus

    @model_validator(mode="after")
    def _check(self) -> Self:
        timed, sized = _TIME.fullmatch(self.time) is not None, _MEMORY.fullmatch(self.memory) is not None
        require(timed, "time", self.time, 'a time as sbatch takes it, e.g. "04:00:00"')
        require(sized, "memory", self.memory, 'a number with K, M, G or T, e.g. "32G"')
        require(self.threads <= self.cpus, "threads", self.threads, f"at most cluster.cpus ({self.cpus})")
        ahead = f"more than the {self.warning_seconds} s ahead of it that a job is asked to stop: one batch"
        ahead += f" (cluster.batch_seconds, {self.batch_seconds:g}) and {_EXTRA_SECONDS:g} s"
        require(self.time_seconds > self.warning_seconds, "time", self.time, ahead)
        for folder in self.volumes:
            require(folder.startswith("/"), "volumes", folder, "absolute folders in the pods")
        return self
