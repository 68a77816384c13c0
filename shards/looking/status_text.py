"""A status for people, line by line, and for programs, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.progress import format_seconds
from shards.files.names import parse_shard_name
from shards.looking.status import SeenTask, Status

_SHOWN = 20
"""Missing shards that a line names."""


def status_values(status: Status) -> dict[str, Any]:
    """Return a status as JSON values; the names stay what they are from version to version."""
    made = status.how_made
    return {
        "complete": status.is_complete,
        "shards_planned": status.shards_planned,
        "shards_done": status.shards_done,
        "shards_in_work": [parse_shard_name(name) for name in status.shards_in_work],
        "missing": list(status.missing),
        "missing_tasks": None if made is None else made.elements(status.missing),
        "num_tasks": None if made is None else made.num_tasks,
        "command": None if made is None else made.arguments,
        "command_folder": None if made is None else made.folder,
        "inputs_planned": status.inputs_planned,
        "inputs_done": status.inputs_done,
        "failures": status.failures,
        "inputs_per_second": status.inputs_per_second,
        "seconds_since_commit": status.seconds_since_commit,
        "seconds_left": status.seconds_left,
        "leftovers": status.leftovers,
        "problems": list(status.problems),
        "tasks": [
            {
                "task_index": task.note.task_index,
                "num_tasks": task.note.num_tasks,
                "host": task.note.host,
                "pid": task.note.pid,
                "alive": task.alive,
                "seconds_since_seen": task.seconds_since_seen,
                "started": task.note.started,
                "shard": None if task.note.shard is None else parse_shard_name(task.note.shard),
                "shards_committed": task.note.committed,
            }
            for task in status.tasks
        ],
    }


def format_status(status: Status) -> list[str]:
    """Spell a status out, one fact a line."""
    share = status.inputs_done / max(status.inputs_planned, 1)
    shards = f"{status.shards_done} of {status.shards_planned} done, {len(status.shards_in_work)} in work"
    lines = [
        f"shards   {shards}" + (f", {len(status.missing)} missing" if status.missing else ""),
        f"inputs   {status.inputs_done:,} of {status.inputs_planned:,} done ({share:.1%})",
    ]
    failed = sum(status.failures.values())
    reasons = "".join(f"; {number} {reason}" for reason, number in status.failures.items())
    lines.append(f"failed   {failed}{reasons}")
    if status.inputs_per_second:
        lines.append(f"rate     {status.inputs_per_second:.3g} inputs/s")
    if status.seconds_since_commit is not None:
        lines.append(f"last     committed {format_seconds(status.seconds_since_commit)} ago")
    if status.seconds_left:
        lines.append(f"left     {format_seconds(status.seconds_left)}")
    lines += map(_format_task, status.tasks)
    if status.missing:
        lines += _format_missing(status)
    if status.leftovers:
        lines.append(
            f"dead     {status.leftovers} temporary files of dead tasks; the next run removes them, or `clean`"
        )
    return lines + [f"problem  {problem}" for problem in status.problems]


def summarise(status: Status) -> str:
    """Say in a few words how far a set is."""
    done = f"{status.shards_done} of {status.shards_planned} shards done"
    if status.is_complete:
        return done
    work = f"{len(status.shards_in_work)} in work by other tasks" if status.shards_in_work else ""
    missing = ""
    if status.missing:
        more = "..." if len(status.missing) > _SHOWN else ""
        missing = f"{len(status.missing)} missing ({format_numbers(status.missing[:_SHOWN])}{more})"
    return ", ".join(filter(None, (done, work, missing)))


def _format_task(task: SeenTask) -> str:
    note = task.note
    work = f"{note.shard} in work" if note.shard and task.alive else "no shard in work"
    seen = "alive" if task.alive else "dead"
    since = format_seconds(task.seconds_since_seen)
    return f"task     {note.task_index} of {note.num_tasks} on {note.host}: {seen}, seen {since} ago; {work}," + (
        f" {note.committed} committed"
    )


def _format_missing(status: Status) -> list[str]:
    lines = [f"missing  {format_numbers(status.missing)}"]
    if status.how_made is None:
        return [*lines, "         run the same precompute again: any one task makes what is missing"]
    made = status.how_made
    lines.append(f"         any one task makes them: {made.shell_command()}")
    if made.num_tasks > 1:
        elements = format_numbers(made.elements(status.missing))
        lines.append(f"         as an array: --array={elements} with --num-tasks {made.num_tasks}")
    return lines


def format_numbers(numbers: Sequence[int]) -> str:
    """Return rising numbers as Slurm writes an array, e.g. "0-3,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
