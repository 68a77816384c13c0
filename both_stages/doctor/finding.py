"""What a check comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from common.faults import explain

Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's."""

    check: str
    """What was looked at, in a word or two."""
    level: Level
    """"ok"; "warning": everything works, though not as well as it could; "fault": a command would end with it."""
    said: str
    """What was found; of a fault or warning, also what to do."""
    exit_code: int = 0
    """Of a fault: what that command would end with."""


def well(check: str, said: str) -> Finding:
    """Return a finding that all is as it should be."""
    return Finding(check=check, level="ok", said=said)


def warning(check: str, said: str) -> Finding:
    """Return a finding that stops nothing."""
    return Finding(check=check, level="warning", said=said)


def examine(check: str, action: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield what a check finds; an error meant for people that ends it is a fault.

    Raises:
        Exception: it is a bug.
    """
    try:
        yield from action()
    except Exception as error:
        ending = explain(error)
        if ending is None:
            raise
        yield Finding(check=check, level="fault", said=ending[0], exit_code=ending[1])
