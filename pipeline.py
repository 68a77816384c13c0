#!/usr/bin/env python3
"""The command line: the only file that prints results, exits, or composes both stages.

A stage is imported only inside a command's body: whatever a training worker imports must not hold the teacher.

Exit codes: 0 done; 2 usage; 3 bad input or data, permanent; 75 stopped by a signal with everything committed (run
again); 1 a bug.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from common.config import load_config
from common.errors import AppError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --config, --set and --dry-run; the command receives `config: Config`."""

    @click.option(
        "--config", "config_path", type=click.Path(path_type=Path), help="TOML file, e.g. configs/tiny.toml."
    )
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


def directory(**kwargs: Any) -> click.Path:
    """A path-valued option type; existence is checked by the command, with an error that says the remedy."""
    return click.Path(path_type=Path, **kwargs)


class Cli(click.Group):
    """A group that turns an `AppError` into one line and its exit code, and takes --debug anywhere."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; with --debug errors keep their traceback."""
        arguments = list(kwargs.pop("args", None) or (args[0] if args else sys.argv[1:]))
        debug = "--debug" in arguments
        arguments = [argument for argument in arguments if argument != "--debug"]
        _set_up_logging(debug)
        try:
            return super().main(args=arguments, prog_name="pipeline.py", **kwargs)
        except AppError as error:
            if debug:
                raise
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            if debug or isinstance(error, BrokenPipeError):
                raise
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            sys.exit(3)


def _set_up_logging(debug: bool) -> None:
    rank = os.environ.get("RANK", "0")
    level = logging.DEBUG if debug else logging.INFO if rank == "0" else logging.WARNING
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for package in ("common", "shards", "stage1_teacher", "stage2_student"):
        logging.getLogger(package).setLevel(level)


@click.group(cls=Cli, context_settings=CONTEXT, epilog="--debug, anywhere, shows the traceback of an error.")
def cli() -> None:
    """Distil AnyText2 into a few-step LoRA student, in two stages that never share a process."""


# Each command below: options here, work in its package.


if __name__ == "__main__":
    cli()
