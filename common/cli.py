"""What all commands share: how an error ends one, logging, the configuration, and options that several have.

Each option is declared once; where commands mean different things by it, they give its help.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from common.config import load_config
from common.errors import UsageError
from common.faults import ending_with_its_pipe, explain, leave
from common.files import require_suffix
from common.logs import Format, print_error, set_up_logging

logger = logging.getLogger(__name__)

Command = Callable[..., None]
Decorator = Callable[[Command], Command]

# Whether a path is there is checked by the command, with an error that says the remedy.
PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)


class Cli(click.Group):
    """A group that turns an `AppError` into one line and its exit code; --debug and --log-format go anywhere."""

    def __init__(self, *args: Any, program: str, packages: Sequence[str], **kwargs: Any) -> None:
        """Make the group.

        Args:
            *args: of `click.Group`.
            program: its name in messages.
            packages: those whose progress is logged.
            **kwargs: of `click.Group`.
        """
        context = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
        epilog = (
            "Anywhere: --debug shows the traceback of an error, --log-format json logs one JSON object a line."
        )
        super().__init__(*args, **{"context_settings": context, "epilog": epilog, **kwargs})
        self.program, self.packages = program, packages

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; with --debug errors keep their traceback."""
        arguments = list(kwargs.pop("args", None) or (args[0] if args else sys.argv[1:]))
        debug = "--debug" in arguments
        arguments = [argument for argument in arguments if argument != "--debug"]
        try:
            set_up_logging(self.packages, debug=debug, log_format=_take_log_format(arguments))
            with _faults_of_threads_in_a_line():
                return super().main(args=arguments, **{**kwargs, "prog_name": self.program})
        except Exception as error:
            _end(error, debug)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments, or print help; click itself ends a closed pipe with 1."""
        with ending_with_its_pipe():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see `make_context`."""
        with ending_with_its_pipe():
            return super().invoke(ctx)


def _end(error: Exception, debug: bool) -> NoReturn:
    """Exit with one line about an error that is meant for people; any other keeps its traceback."""
    if isinstance(error, OSError) and error.filename is None and _was_printing(error):
        error.filename = "standard output"
    ending = explain(error)
    if debug or ending is None:
        raise error
    message, code = ending
    print_error(message, code)
    leave(code)


@contextmanager
def _faults_of_threads_in_a_line() -> Iterator[None]:
    """Spare people the traceback of a library's thread that met a fault of the machine, e.g. of TensorBoard's."""
    before = threading.excepthook

    def hook(ended: threading.ExceptHookArgs) -> None:
        ending = None if ended.exc_value is None else explain(ended.exc_value)
        if ending is None:
            before(ended)
        else:
            logger.warning("%s", ending[0])

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _was_printing(error: OSError) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).parent.name == "click"


def _take_log_format(arguments: list[str]) -> Format:
    """Take --log-format out of the arguments; it may stand anywhere."""
    name, chosen = "--log-format", "text"
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag != name:
            continue
        chosen = value if equals else "".join(arguments[place + 1 : place + 2])
        del arguments[place : place + (1 if equals else 2)]
        break
    if chosen == "json":
        return "json"
    if chosen != "text":
        raise UsageError(f"{name}: received {chosen!r}, expected text or json")
    return "text"


def config_options(command: Command) -> Command:
    """Add --config, --set and --dry-run; the command receives `config: Config`."""

    @click.option("--config", "config_path", type=PATH, help="TOML file, e.g. configs/tiny.toml.")
    @click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Change one configuration value.",
    )
    @click.option("--dry-run", is_flag=True, help="Print the resolved configuration and stop.")
    @functools.wraps(command)
    def wrapper(config_path: Path | None, overrides: tuple[str, ...], dry_run: bool, **kwargs: Any) -> None:
        config = load_config(config_path, overrides)
        if dry_run:
            click.echo(json.dumps(config.as_dict(), indent=2))
            return
        command(config=config, **kwargs)

    return wrapper


def input_options(command: Command) -> Command:
    """Add --annotations and --prompts, of which one must be given; the command receives tuples of paths."""

    @click.option("--annotations", multiple=True, type=FILE, help="AnyWord json; again for more files.")
    @click.option("--prompts", multiple=True, type=FILE, help="Prompts JSONL; again for more files.")
    @functools.wraps(command)
    def wrapper(annotations: tuple[Path, ...], prompts: tuple[Path, ...], **kwargs: Any) -> None:
        if not annotations and not prompts:
            raise UsageError("no inputs; give --annotations FILE or --prompts FILE")
        command(annotations=annotations, prompts=prompts, **kwargs)

    return wrapper


def shards_folder_option(command: Command) -> Command:
    """Add --shards for a set on disk; the command receives `shards: Path`."""
    return click.option("--shards", type=FOLDER, required=True, help="Folder of the shards.")(command)


def shards_option(help_text: str = "A set that precompute wrote.", *, required: bool = True) -> Decorator:
    """Add --shards for a set on disk or at a URL; the command receives `shards: str`."""
    return click.option("--shards", required=required, metavar="DIR_OR_URL", help=help_text)


def adapter_option(
    help_text: str = "A run's folder, a checkpoint, an adapter, or what export wrote.", *, required: bool = True
) -> Decorator:
    """Add --adapter for one student; the command receives `adapter: Path`."""
    return click.option("--adapter", type=PATH, required=required, help=help_text)


def out_option(help_text: str, kind: click.Path, *, suffixes: Sequence[str] = (), **attributes: Any) -> Decorator:
    """Add --out, required unless it is said otherwise; the command receives `out: Path`.

    Args:
        help_text: what is written.
        kind: of path.
        suffixes: of names that say what is written, others are refused; none for any.
        **attributes: of `click.option`.
    """

    def check(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
        if value is not None and suffixes:
            require_suffix(value, *suffixes)
        return value

    return click.option("--out", type=kind, help=help_text, callback=check, **{"required": True, **attributes})


def refuse_ignored(because: str, *names: str) -> None:
    """Refuse options that the running command would ignore.

    Args:
        because: why, as in "--record brings its own".
        *names: of the command's parameters.

    Raises:
        UsageError: one of them was given.
    """
    context = click.get_current_context()
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        listed = ", ".join(options[name] for name in given)
        raise UsageError(f"received {listed}, which would be ignored: {because}; leave {listed} out")
