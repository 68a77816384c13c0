"""How a set's tasks were started, for whoever starts them again: kept beside the set, no part of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from common.files import canonical_json, read_bytes, write_bytes_atomic
from shards.files.names import COMMAND


@dataclass(frozen=True, slots=True, kw_only=True)
class HowMade:
    """A command, and among how many tasks it shared the work."""

    arguments: list[str]
    """The program and what it was given."""
    folder: str
    """Where it ran: relative paths start there."""
    num_tasks: int

    def elements(self, shards: Iterable[int]) -> list[int]:
        """Return the tasks that begin with these shards, rising."""
        return sorted({shard % self.num_tasks for shard in shards})

    def shell_command(self) -> str:
        """Return the command as a shell takes it, without the number of a task."""
        arguments = list(self.arguments)
        for flag in ("--task-index", "--num-tasks"):
            if flag in arguments:
                place = arguments.index(flag)
                del arguments[place : place + 2]
        if arguments and arguments[0].endswith(".py"):
            arguments.insert(0, "python")
        moved = "" if self.folder == str(Path.cwd()) else f"cd {shlex.quote(self.folder)} && "
        return moved + shlex.join(arguments)


def write_how_made(folder: Path, num_tasks: int) -> None:
    """Keep how this program was started, unless that is what is kept already.

    Args:
        folder: the set's.
        num_tasks: that share the work.
    """
    made = HowMade(arguments=[Path(sys.argv[0]).name, *sys.argv[1:]], folder=str(Path.cwd()), num_tasks=num_tasks)
    if read_how_made(folder) != made:
        write_bytes_atomic(folder / COMMAND, canonical_json(asdict(made)))


def read_how_made(folder: Path) -> HowMade | None:
    """Return how the set's tasks were started last, None if that is not known."""
    try:
        return HowMade(**json.loads(read_bytes(folder / COMMAND)))
    except (FileNotFoundError, ValueError, TypeError):
        return None
