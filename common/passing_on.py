"""Options of one command, taken by another that has it run elsewhere: declared once, and spelled out again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from common.errors import DataError, UsageError


def take_options(command: click.Command, source: click.Command, *, without: Collection[str]) -> None:
    """Let a command take the options of another, but for some by their parameters' names."""
    own = {parameter.name for parameter in command.params}
    command.params += [each for each in source.params if each.name not in own and each.name not in without]


def spell_given(
    context: click.Context,
    source: click.Command,
    *,
    elsewhere: bool,
    only: Collection[str] = (),
    without: Collection[str] = (),
) -> tuple[str, ...]:
    """Return the options of another command that this one was given, as they stand on a command line.

    Args:
        context: of the running command, see `take_options`.
        source: whose options they are.
        elsewhere: paths are those of another machine: they must be absolute, and are not looked at. Else they
            are made absolute, and files that would be read must be there.
        only: these of them, by their parameters' names; all if empty.
        without: none of these, which the running command takes for itself.

    Raises:
        UsageError: a path elsewhere is relative.
        DataError: a file is missing.
    """
    words: list[str] = []
    for parameter in source.params:
        name = parameter.name or ""
        if (only and name not in only) or name in without or name not in context.params:
            continue
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        for one in value if parameter.multiple else [value]:
            words.append(max(parameter.opts, key=len))
            if not getattr(parameter, "is_flag", False):
                words.append(_spell(one, parameter, elsewhere=elsewhere))
    return tuple(words)


def _spell(value: Any, parameter: click.Parameter, *, elsewhere: bool) -> str:
    if not isinstance(value, Path):
        place = parameter.metavar == "DIR_OR_URL" and "://" not in value  # type: ignore[attr-defined]
        return str(_place(Path(value), parameter, elsewhere)) if place else str(value)
    return str(_place(value, parameter, elsewhere))


def _place(path: Path, parameter: click.Parameter, elsewhere: bool) -> Path:
    option = parameter.opts[0]
    if elsewhere and option != "--config":
        if not path.is_absolute():
            raise UsageError(f"{option} {path}: received a relative path, expected an absolute one, of the pods")
        return path
    kind = parameter.type
    is_read = option == "--config" or (isinstance(kind, click.Path) and not kind.dir_okay and option != "--out")
    if is_read and not path.exists():
        raise DataError(f"{option} {path}: no such file")
    return path.absolute()
