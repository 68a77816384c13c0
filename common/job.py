"""What a job system says of this process in its environment: which of how many it is, and where the others are.

Slurm numbers the elements of an array and, inside a step (`srun`), the step's processes; Kubernetes numbers the
pods of an indexed job; torchrun and accelerate number ranks. In a batch script, outside of any step, Slurm sets
SLURM_PROCID and SLURM_NTASKS too, and they say nothing of this process: SLURM_STEP_NUM_TASKS is in steps alone.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, MutableMapping

from common.errors import UsageError

_FIRST_PORT, _PORTS = 20_000, 12_000
"""Where the processes of a step meet: above the ports of services, below those that systems give to clients."""


def number_tasks(environ: Mapping[str, str], task_index: int | None, num_tasks: int | None) -> tuple[int, int]:
    """Return this task's number and how many there are, from flags or else from the job system.

    The elements of a Slurm array or the pods of an indexed Kubernetes job are numbered; processes inside each,
    torchrun's ranks or a Slurm step's, are numbered further. With `num_tasks` an element has its own number in the
    array, whatever part of the array was submitted; without, the array must be whole, so that its elements can be
    counted. The count decides only where a task starts its work.

    Args:
        environ: of the process.
        task_index: as given by a flag; it is taken as it is.
        num_tasks: as given by a flag: elements of the array, or tasks where there is none.

    Returns:
        (index, count), 0 <= index < count unless the flags say otherwise.

    Raises:
        UsageError: one of the two is unknown.
    """
    if task_index is not None:
        if num_tasks is None:
            raise UsageError(f"task {task_index} of how many? Give --num-tasks")
        return task_index, num_tasks
    element, elements = _element(environ, num_tasks)
    process, processes = _process(environ)
    if element is None:
        index, count = process, num_tasks or processes
    else:
        index, count = element * processes + (process or 0), elements * processes
    if count == 0:
        raise UsageError(f"task {index} of how many? Give --num-tasks")
    if index is None and count > 1:
        raise UsageError(f"which of {count} tasks is this? Give --task-index, 0 to {count - 1}")
    return (index or 0) % count, count


def _element(environ: Mapping[str, str], num_tasks: int | None) -> tuple[int | None, int]:
    """Return the number of this array's element, or pod, and how many there are, 0 for unknown."""
    if "SLURM_ARRAY_TASK_ID" in environ:
        number = _integer(environ, "SLURM_ARRAY_TASK_ID", 0)
        if num_tasks is not None:
            return number, num_tasks
        first, step = _integer(environ, "SLURM_ARRAY_TASK_MIN", 0), _integer(environ, "SLURM_ARRAY_TASK_STEP", 1)
        count = _integer(environ, "SLURM_ARRAY_TASK_COUNT", 0)
        last = _integer(environ, "SLURM_ARRAY_TASK_MAX", first + (count - 1) * step)
        if count and (last - first) // step + 1 != count:
            raise UsageError(
                f"SLURM_ARRAY_TASK_COUNT: received {count} elements from {first} to {last} by {step}, expected all"
                f" {(last - first) // step + 1}: this is a part of an array, and nothing says of how many; give"
                " --num-tasks N, the whole array's number of elements (then each is the task of its own number)"
            )
        return (number - first) // step, count
    if "JOB_COMPLETION_INDEX" in environ:
        return _integer(environ, "JOB_COMPLETION_INDEX", 0), num_tasks or 0  # Kubernetes does not say how many
    return None, 0


def _process(environ: Mapping[str, str]) -> tuple[int | None, int]:
    """Return the number of this process within its launch, None outside of one, and how many there are."""
    if "RANK" in environ:
        return _integer(environ, "RANK", 0), _integer(environ, "WORLD_SIZE", 0)
    if "SLURM_STEP_NUM_TASKS" in environ:
        return _integer(environ, "SLURM_PROCID", 0), _integer(environ, "SLURM_STEP_NUM_TASKS", 1)
    return None, 1


def local_rank(environ: Mapping[str, str]) -> int:
    """Return this process's number among those of its launch on this machine."""
    if "LOCAL_RANK" in environ or "RANK" in environ:
        return _integer(environ, "LOCAL_RANK", 0)
    return _integer(environ, "SLURM_LOCALID", 0) if "SLURM_STEP_NUM_TASKS" in environ else 0


def rank(environ: Mapping[str, str]) -> int:
    """Return this process's number among those that train together, 0 if it is alone."""
    return _process(environ)[0] or 0


def meet_by_slurm(environ: MutableMapping[str, str]) -> None:
    """Let the processes of a Slurm step (`srun -n4 pipeline.py train`) find each other without a launcher.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun would, where
    several processes were started and no launcher numbered them. They meet on the first node of the step, at a
    port that follows from job, step and restart, so that jobs on one node do not meet each other; a MASTER_ADDR or
    MASTER_PORT that is set already stays.

    Args:
        environ: of the process; changed.
    """
    world = _integer(environ, "SLURM_STEP_NUM_TASKS", 1)
    if "RANK" in environ or world == 1:
        return
    environ["RANK"], environ["WORLD_SIZE"] = str(_integer(environ, "SLURM_PROCID", 0)), str(world)
    environ["LOCAL_RANK"] = str(_integer(environ, "SLURM_LOCALID", 0))
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
    node = _integer(environ, "SLURM_NODEID", 0)
    environ.setdefault("LOCAL_WORLD_SIZE", _per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), node))
    alone = _integer(environ, "SLURM_STEP_NUM_NODES", 0) == 1
    environ.setdefault("MASTER_ADDR", "127.0.0.1" if alone else first_host(nodes))
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    key = ".".join(environ.get(name, "") for name in names)
    environ.setdefault("MASTER_PORT", str(_FIRST_PORT + zlib.crc32(key.encode()) % _PORTS))


def first_host(nodes: str) -> str:
    """Return the first of Slurm's list of nodes, e.g. gpu007 of "gpu[007-012,015],cpu1"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "")


def _per_node(tasks: str, node: int) -> str:
    """Return how many processes a node has, of e.g. "2(x3),1"; "1" if that is not said."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
    counts = [count for count, times in runs for _ in range(int(times or 1))]
    return counts[node] if node < len(counts) else "1"


def _integer(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, "").strip()
    try:
        return int(value) if value else default
    except ValueError:
        raise UsageError(f"{name}: received {value!r}, expected an integer; the job system sets it") from None
