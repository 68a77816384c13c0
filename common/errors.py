"""Errors meant for people, each with the exit code that the command line documents.

A message is one line: what, where, received, expected, remedy.
"""

from __future__ import annotations


class AppError(Exception):
    """Base of all errors that a user can act on; anything else that escapes is a bug (exit code 1)."""

    exit_code = 1


class UsageError(AppError):
    """The command, a flag or a configuration value is wrong (exit code 2)."""

    exit_code = 2


class DataError(AppError):
    """An input, a shard, a checkpoint or a prior run is wrong; trying again will not help (exit code 3)."""

    exit_code = 3


class MachineError(AppError):
    """A disk, a connection, a GPU or another process failed; trying again later may help (exit code 74)."""

    exit_code = 74


class Stopped(AppError):
    """A signal or a time limit asked for a stop, all that is finished is committed: run again (exit code 75)."""

    exit_code = 75


def reason(error: BaseException) -> str:
    """Say in a few words why something failed: of the disk's errors what the system says, no number and path."""
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__
