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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from common.config import Config, load_config
from common.errors import AppError, UsageError

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


def _number_tasks(environ: Mapping[str, str], task_index: int | None, num_tasks: int | None) -> tuple[int, int]:
    """Return this task's number and how many there are, from flags or else from the job system.

    A Slurm array or an indexed Kubernetes job numbers tasks; torchrun's ranks inside each are numbered further.

    Raises:
        UsageError: one of the two is unknown.
    """
    index, count = None, 1
    if "SLURM_ARRAY_TASK_ID" in environ:
        first = int(environ.get("SLURM_ARRAY_TASK_MIN", 0))
        index = (int(environ["SLURM_ARRAY_TASK_ID"]) - first) // int(environ.get("SLURM_ARRAY_TASK_STEP", 1))
        count = int(environ.get("SLURM_ARRAY_TASK_COUNT", 0))  # 0: unknown
    elif "JOB_COMPLETION_INDEX" in environ:
        index, count = int(environ["JOB_COMPLETION_INDEX"]), 0  # Kubernetes does not say how many
    if "RANK" in environ:
        world = int(environ.get("WORLD_SIZE", 0))
        index, count = (index or 0) * world + int(environ["RANK"]), count * world
    if task_index is not None:
        index, count = task_index, 0
    count = num_tasks or count
    if count == 0:
        raise UsageError(f"task {index} of how many? Give --num-tasks")
    if index is None and count > 1:
        raise UsageError(f"which of {count} tasks is this? Give --task-index, 0 to {count - 1}")
    return index or 0, count


@cli.command()
@config_options
@click.option(
    "--annotations", multiple=True, type=directory(dir_okay=False), help="AnyWord json; again for more files."
)
@click.option(
    "--prompts", multiple=True, type=directory(dir_okay=False), help="Prompts JSONL; again for more files."
)
@click.option("--out", type=directory(file_okay=False), required=True, help="Folder of the shards.")
@click.option("--task-index", type=click.IntRange(min=0), help="Which task this is. Default: from the job system.")
@click.option("--num-tasks", type=click.IntRange(min=1), help="Tasks that share the work. Default: likewise.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first N inputs.")
def precompute(
    config: Config,
    annotations: tuple[Path, ...],
    prompts: tuple[Path, ...],
    out: Path,
    task_index: int | None,
    num_tasks: int | None,
    limit: int | None,
) -> None:
    """Stage one: run the teacher on inputs and record what it does, as shards.

    Run it again to go on after a stop; start it in several tasks to share the work. The task's number and count
    come from SLURM_ARRAY_TASK_ID, JOB_COMPLETION_INDEX or RANK where the flags are not given.

    Example: pipeline.py precompute --config configs/tiny.toml --annotations demo/data.json --out demo/shards
    """
    if not annotations and not prompts:
        raise UsageError("no inputs; give --annotations FILE or --prompts FILE")
    index, count = _number_tasks(os.environ, task_index, num_tasks)

    import torch

    from stage1_teacher.precompute import precompute as run

    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    done = run(
        config, out, annotations=annotations, prompts=prompts, task_index=index, num_tasks=count, limit=limit
    )
    click.echo(
        f"{out}: {done.shards_written} shards written with {done.records} records, {done.shards_found} were there,"
        f" {done.failed} inputs failed; task {index} of {count}, {done.shards_planned} shards planned in all"
    )


@cli.command()
@click.option("--shards", type=directory(file_okay=False), required=True, help="Folder of the shards.")
@click.option("--quick", is_flag=True, help="Trust the files' sizes; do not read them to check their hashes.")
def finalize(shards: Path, quick: bool) -> None:
    """Check that a set of shards is complete and sound, and write its summary.json.

    Example: pipeline.py finalize --shards demo/shards
    """
    from shards.finalize import finalize as run

    summary = run(shards, quick=quick)
    click.echo(
        f"{shards}: complete, {summary.samples} samples in {summary.shards} shards, {summary.bytes:,} bytes"
    )
    for reason, number in summary.failures.items():
        click.echo(f"  {number} inputs failed: {reason}")
    errors = ", ".join(f"{name} {value:.1e}" for name, value in summary.rounding_error.items())
    click.echo(f"  rms error that float16 makes: {errors}")
    click.echo(f"  set hash {summary.set_hash}")


@cli.command()
@config_options
@click.option("--shards", required=True, metavar="DIR_OR_URL", help="A set that precompute wrote.")
@click.option("--out", type=directory(file_okay=False), required=True, help="The run's folder.")
@click.option(
    "--resume",
    default="none",
    show_default=True,
    metavar="none|auto|CHECKPOINT",
    help="auto: go on from the newest complete checkpoint, or start if there is none.",
)
@click.option("--allow-incomplete", is_flag=True, help="Train on what is committed although more is planned.")
@click.option("--exclude-damaged", is_flag=True, help="Leave damaged samples out; the set is then another one.")
def train(
    config: Config, shards: str, out: Path, resume: str, allow_incomplete: bool, exclude_damaged: bool
) -> None:
    """Train a student from shards alone; no part of the teacher is loaded.

    On many GPUs and nodes start it by accelerate launch or torchrun.

    Example: pipeline.py train --config configs/tiny.toml --shards demo/shards --out demo/run --resume auto
    """
    from stage2_student.train import train as run_training

    result = run_training(
        config,
        shards=shards,
        run=out,
        resume=resume,
        allow_incomplete=allow_incomplete,
        exclude_damaged=exclude_damaged,
        announce=click.echo,
    )
    if os.environ.get("RANK", "0") == "0":
        loss = "" if result.loss is None else f", loss {result.loss:.4g}"
        click.echo(f"{result.steps} steps done{loss}; checkpoint {result.checkpoint}")


if __name__ == "__main__":
    cli()
