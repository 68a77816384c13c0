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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from common.config import PROJECT_ROOT, Config, load_config
from common.errors import AppError, DataError, UsageError, explain
from common.signals import StopFlag

if TYPE_CHECKING:
    from common.anytext2.conditioning import Uncond
    from stage1_teacher.teacher.teacher import Teacher
    from stage2_student.evaluation.runs import Drawn, Job, Plan, Run

TRUE_IMAGES = "true images"
"""Label of the run that reads what was not drawn."""
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
            return super().main(args=arguments, **{**kwargs, "prog_name": "pipeline.py"})
        except (AppError, OSError) as error:
            if debug or isinstance(error, BrokenPipeError):
                raise
            message, code = explain(error)
            click.echo(f"error: {message}", err=True)
            sys.exit(code)


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
@click.option(
    "--trajectories", type=directory(file_okay=False), help="Keep whole rollouts too, in this folder (zarr)."
)
@click.option("--upload", metavar="URL", help="Copy each shard there after its commit; any fsspec URL.")
def precompute(
    config: Config,
    annotations: tuple[Path, ...],
    prompts: tuple[Path, ...],
    out: Path,
    task_index: int | None,
    num_tasks: int | None,
    limit: int | None,
    trajectories: Path | None,
    upload: str | None,
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
        config,
        out,
        annotations=annotations,
        prompts=prompts,
        task_index=index,
        num_tasks=count,
        limit=limit,
        trajectories=trajectories,
        upload=upload,
    )
    click.echo(
        f"{out}: {done.shards_written} shards written with {done.records} records, {done.shards_found} were there,"
        f" {done.failed} inputs failed; task {index} of {count}, {done.shards_planned} shards planned in all"
        + (f"; {done.uploaded} shards uploaded to {upload}" if upload else "")
    )


@cli.command()
@click.option("--shards", type=directory(file_okay=False), required=True, help="Folder of the shards.")
@click.option("--quick", is_flag=True, help="Trust the files' sizes; do not read them to check their hashes.")
def finalize(shards: Path, quick: bool) -> None:
    """Check that a set of shards is complete and sound, and write its summary.json.

    Example: pipeline.py finalize --shards demo/shards
    """
    from shards.looking.finalize import finalize as run

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
@click.option("--shards", type=directory(file_okay=False), required=True, help="Folder of the shards.")
def status(shards: Path) -> None:
    """Show how far a running set is: shards done, in work, failed inputs, rate, time left.

    Example: pipeline.py status --shards demo/shards
    """
    from shards.looking.status import format_status, read_status

    for line in format_status(read_status(shards)):
        click.echo(line)


@cli.command()
@click.option("--shards", required=True, metavar="DIR_OR_URL", help="A set that precompute wrote.")
@click.option("--out", type=directory(), metavar="FILE", help="Draw a contact sheet too; needs the teacher's VAE.")
@click.option("--records", default=4, show_default=True, type=click.IntRange(min=1), help="Rows of the sheet.")
@config_options
def inspect(config: Config, shards: str, out: Path | None, records: int) -> None:
    """Show what is in a set: counts, settings, failures, ranges of every tensor; with --out a picture of records.

    Example: pipeline.py inspect --config configs/tiny.toml --shards demo/shards --out demo/contact_sheet.png
    """
    from shards.files.failures import count_by_reason, read_failures
    from shards.looking.inspect import describe_set
    from shards.reading.reader import ShardSet

    found = ShardSet.open(shards, allow_incomplete=True)
    failures = {} if "://" in shards else count_by_reason(read_failures(Path(shards)))
    for line in describe_set(found, failures):
        click.echo(line)
    if out is not None:
        from shards.looking.contact_sheet import draw_contact_sheet
        from stage2_student.student.sample import decode, load_decoder

        step = max(len(found) // records, 1)
        rows = [found[index] for index in range(0, len(found), step)][:records]
        sheet = draw_contact_sheet(rows, functools.partial(decode, load_decoder(config)))
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out)
        click.echo(f"{out}")


@cli.command()
@click.option("--shards", type=directory(file_okay=False), required=True, help="Folder of the shards.")
@click.option("--to", "url", required=True, metavar="URL", help="Where, e.g. s3://bucket/set; any fsspec URL.")
def upload(shards: Path, url: str) -> None:
    """Copy what is committed to a URL, each shard's sidecar last; run it again, any time, for what came since.

    Example: pipeline.py upload --shards demo/shards --to s3://bucket/set
    """
    from shards.remote.upload import upload_set

    click.echo(f"{url}: {len(upload_set(shards, url))} shards uploaded")


@cli.command()
@click.option("--shards", required=True, metavar="DIR_OR_URL", help="A set that precompute wrote.")
@click.option("--recompute", type=click.IntRange(min=1), metavar="N", help="Run the teacher again on N records.")
@click.option("--tolerance", default=5e-2, show_default=True, help="Largest difference that --recompute accepts.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="That hash; 0 for one per core.")
@config_options
def verify(config: Config, shards: str, recompute: int | None, tolerance: float, threads: int) -> None:
    """Check every hash and checksum of a set and name all damage; with --recompute N ask the teacher too.

    Exits with 3 if anything is damaged.

    Example: pipeline.py verify --shards demo/shards
    """
    from shards.looking.verify import audit

    found, damages = audit(shards, num_threads=threads)
    for damage in damages:
        click.echo(damage)
    if damages or found is None:
        count = f"{len(damages)} damage{'s' * (len(damages) != 1)} found"
        raise DataError(f"{shards}: {count}, listed above; run precompute again to mend the shards")
    click.echo(f"{shards}: sound, {len(found)} samples in {len(found.headers)} shards")
    if recompute is not None:
        from common.seeding import rng
        from stage1_teacher.recording.recompute import recompute as run_teacher

        chosen = rng("recompute", found.set_hash).sample(range(len(found)), min(recompute, len(found)))
        largest = 0.0
        for result in run_teacher(config, found, sorted(chosen)):
            largest = max(largest, result.largest)
            click.echo(f"record {result.index} ({result.input_id}): largest difference {result.largest:.2e}")
        click.echo(f"largest difference of {len(chosen)} records: {largest:.2e}")
        if not largest <= tolerance:
            raise DataError(f"recomputed records differ by {largest:.2e}, expected at most {tolerance:g}")


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


@cli.command()
@config_options
@click.option("--adapter", type=directory(), help="Draw with a student: a run's folder, a checkpoint, an adapter.")
@click.option("--teacher", "with_teacher", is_flag=True, help="Draw with the teacher: DDIM with guidance.")
@click.option(
    "--compare", is_flag=True, help="With --adapter: the teacher's picture of the same noise to its left."
)
@click.option("--prompt", help="Caption; the texts to draw stand in it in quotation marks.")
@click.option(
    "--box", "boxes", multiple=True, metavar="X0,Y0,X1,Y1", help="Where each text goes, pixels; again for more."
)
@click.option("--color", "colors", multiple=True, metavar="#RRGGBB", help="Of each text, or one for all.")
@click.option("--font", help="A configured font's name, or a font file.")
@click.option("--image", type=directory(dir_okay=False), help="Edit this image instead of generating one.")
@click.option("--record", type=click.IntRange(min=0), help="Take the conditioning of a record of --shards.")
@click.option("--shards", metavar="DIR_OR_URL", help="With --record: its set.")
@click.option("--steps", type=click.IntRange(min=1), help="Of the teacher; a student has its own number.")
@click.option("--seed", type=int, help="Keys the noise. Default: 0; of a record, the noise that the teacher had.")
@click.option(
    "--num-images", type=click.IntRange(min=1), default=1, show_default=True, help="Each of other noise."
)
@click.option(
    "--out", type=directory(dir_okay=False), required=True, help="PNG file; with a number if there are more."
)
def sample(
    config: Config,
    adapter: Path | None,
    with_teacher: bool,
    compare: bool,
    record: int | None,
    shards: str | None,
    steps: int | None,
    seed: int | None,
    num_images: int,
    out: Path,
    **prompt: Any,
) -> None:
    """Draw images: with the teacher or a student, from a prompt with boxes or from a record.

    From a record a student needs no part of the teacher; --compare then shows the teacher's picture as recorded.

    Example: pipeline.py sample --config configs/tiny.toml --adapter demo/run --prompt 'a sign that says "OPEN"'
    --box 16,40,112,88 --out open.png
    """
    if (adapter is None) != with_teacher:
        raise UsageError("who draws? Give one of --adapter RUN and --teacher; --compare puts both side by side")
    if (prompt["prompt"] is None) == (record is None) or (record is None) != (shards is None):
        raise UsageError("draw what? Give --prompt with a --box for each text, or --record with --shards")
    if compare and with_teacher:
        raise UsageError("--compare goes with --adapter: it adds the teacher's picture")
    import torch

    from common.anytext2.conditioning import ConditioningBatch
    from common.pictures import beside, write_png
    from stage2_student.student.sample import Sampler, decode, draw_noise, load_decoder

    sampler = None if adapter is None else Sampler.load(config, adapter, steps)
    teacher, columns = None, []
    if prompt["prompt"] is not None or with_teacher:
        from stage1_teacher.teacher.teacher import Teacher

        teacher = Teacher.load(config)
    found = _read_record(config, str(shards), record, seed, num_images) if record is not None else None
    item = _encode_prompt(config, teacher, **prompt) if found is None else found.record.conditioning
    shape = tuple(item.masked_latents.shape)
    count = 1 if sampler is None else sampler.noises_needed
    noise = torch.stack([draw_noise(seed or 0, number, shape, count) for number in range(num_images)])
    if found is not None and found.noise is not None:
        noise[:, 0] = found.noise
    decoder = load_decoder(config) if teacher is None else teacher.vae
    if compare and found is not None and found.x0 is not None:
        columns.append(decode(decoder, found.x0))
    elif with_teacher or (compare and teacher is not None):
        columns.append(
            decode(decoder, _solve(config, teacher, item, noise[:, 0], steps if with_teacher else None))
        )
    elif compare:
        raise UsageError(
            "--compare with --record shows what was recorded: leave --seed out, or draw with --teacher"
        )
    if sampler is not None:
        columns.append(decode(decoder, sampler.latents(ConditioningBatch.stack([item] * num_images), noise)))
    for number, row in enumerate(zip(*columns, strict=True)):
        path = out if num_images == 1 else out.with_stem(f"{out.stem}_{number}")
        write_png(path, beside(row))
        click.echo(f"{path}")


class _Found(NamedTuple):
    """A record, and where it was recorded from what to what if that is wanted."""

    record: Any
    noise: Any
    x0: Any


def _read_record(config: Config, location: str, index: int, seed: int | None, num_images: int) -> _Found:
    """Read a record to sample from; its own noise and solved latents unless a seed asks for others."""
    from common.anytext2.fingerprint import fingerprint
    from shards.reading.reader import ShardSet
    from stage2_student.student.shard_facts import read_facts, require_base

    shards = ShardSet.open(location, allow_incomplete=True)
    if index >= len(shards):
        raise UsageError(f"--record {index}: {location} holds records 0 to {len(shards) - 1}")
    base = fingerprint(config.resolve(config.model.checkpoint, "model.checkpoint"), "base")
    require_base(read_facts(shards), base, location)
    record = shards[index]
    if seed is not None or record.meta.source != "rollout":
        return _Found(record, None, None)
    if num_images > record.num_rollouts:
        raise UsageError(
            f"--num-images {num_images}: the record holds {record.num_rollouts} solves; give --seed for more"
        )
    solves = record.rollout_latents[:num_images].float()  # (B, S + 1, C, h, w)
    return _Found(record, solves[:, 0], solves[:, -1])


def _encode_prompt(
    config: Config, teacher: Any, prompt: str, boxes: Any, colors: Any, font: Any, image: Any
) -> Any:
    """Draw and encode a prompt, as precompute does."""
    from stage1_teacher.inputs.prompt_text import prompt_from_text
    from stage1_teacher.rendering.rendered_input import DrawSettings, draw_input

    settings = DrawSettings.from_config(config)
    content = prompt_from_text(
        prompt, boxes, size=settings.size, fonts=settings.fonts, colors=colors, font=font, image=image
    )
    return teacher.encode([draw_input(content, settings)])[0]


def _solve(config: Config, teacher: Any, item: Any, noise: Any, steps: int | None) -> Any:
    """Solve the teacher's ODE on the trailing grid with the configured guidance; returns latents."""
    from common.ddim import trailing_grid
    from stage1_teacher.teacher.solver import solve

    rollout = solve(
        teacher,
        [item] * len(noise),
        teacher.unconditional(),
        noise,
        trailing_grid(steps or config.precompute.solver_steps),
        guidance_scale=config.precompute.guidance_scale,
        keep=(),
        round_states=False,
    )
    return rollout.states[:, -1]


@cli.command()
@click.option("--shards", required=True, metavar="DIR_OR_URL", help="A set of recorded solves.")
@click.option("--adapter", type=directory(), required=True, help="A run's folder, a checkpoint, an adapter.")
@click.option("--records", default="0,1,2,3", show_default=True, metavar="I,J,...", help="Which records to draw.")
@click.option("--out", type=directory(), required=True, metavar="FILE", help="PNG file.")
@config_options
def compare(config: Config, shards: str, adapter: Path, records: str, out: Path) -> None:
    """Draw layout, teacher and student side by side, from the same noise, for some records.

    Example: pipeline.py compare --config configs/tiny.toml --shards demo/shards --adapter demo/run --out out.png
    """
    try:
        indices = [int(part) for part in records.split(",")]
    except ValueError:
        raise UsageError(f"--records: received {records!r}, expected numbers such as 0,1,2") from None
    from common.pictures import write_png
    from shards.reading.reader import ShardSet
    from stage2_student.student.compare import compare as draw

    write_png(out, draw(config, ShardSet.open(shards, allow_incomplete=True), adapter, indices))
    click.echo(f"{out}")


@cli.command()
@click.option("--out", type=directory(), default=Path("demo"), show_default=True, help="Folder for everything.")
@click.option("--count", type=click.IntRange(min=8), default=96, show_default=True, help="Inputs to generate.")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Training steps.")
@click.option(
    "--layouts", type=click.IntRange(min=4), default=24, show_default=True, help="Held-out ones, measured."
)
@click.option("--quick", is_flag=True, help="The same with 24 inputs, 40 steps and 8 layouts.")
def demo(out: Path, count: int, steps: int, layouts: int, quick: bool) -> None:
    """Run everything on the embedded tiny teacher: minutes on a CPU, no download.

    It runs the ordinary commands, and prints each, so that you can run them yourself. Run again, it goes on; other
    counts or steps need another --out.

    Example: pipeline.py demo --out demo
    """
    from stage2_student.evaluation.summary import format_table, summarise

    if quick:
        count, steps, layouts = 24, 40, 8
    out = Path(os.path.relpath(out.absolute(), PROJECT_ROOT))  # the commands are run, and shown, from there
    tiny = ("--config", "configs/tiny.toml")
    data, held_out, shards, run = out / "data", out / "held_out", out / "shards", out / "run"
    evaluation, page, sheet = out / "evaluation", out / "report.html", out / "contact_sheet.png"
    training = ("--set", f"train.max_steps={steps}", "--set", f"train.checkpoint_every={max(steps // 3, 1)}")
    measuring = ("--adapter", run, "--truth", "--set", f"evaluate.num_samples={layouts}")
    generate = ("-m", "stage1_teacher.tiny.data")
    program = "pipeline.py"
    commands: dict[str, tuple[tuple[Any, ...], Path]] = {
        "generate data": ((*generate, "--count", count, "--out", data), data / "data.json"),
        "precompute": (
            (program, "precompute", *tiny, "--annotations", data / "data.json", "--out", shards),
            shards,
        ),
        "finalize": ((program, "finalize", "--shards", shards), shards / "summary.json"),
        "inspect": ((program, "inspect", *tiny, "--shards", shards, "--out", sheet), sheet),
        "train": (
            (program, "train", *tiny, *training, "--shards", shards, "--out", run, "--resume", "auto"),
            run,
        ),
        "compare": (
            (program, "compare", *tiny, "--shards", shards, "--adapter", run, "--out", out / "comparison.png"),
            out / "comparison.png",
        ),
        "held-out data": (
            (*generate, "--count", layouts, "--seed", 1, "--out", held_out),
            held_out / "data.json",
        ),
        "evaluate": (
            (program, "evaluate", *tiny, *measuring, "--annotations", held_out / "data.json", "--out", evaluation),
            evaluation / "evaluation.json",
        ),
        "report": ((program, "report", "--evaluation", evaluation, "--run", run, "--out", page), page),
    }
    seconds = {name: _run_step(arguments) for name, (arguments, _) in commands.items()}
    click.echo(f"\n{'what was done':<16}{'seconds':>9}  where it is")
    for name, (_, where) in commands.items():
        click.echo(f"{name:<16}{seconds[name]:>9.1f}  {where}")
    click.echo(f"{'all':<16}{sum(seconds.values()):>9.1f}\n")
    click.echo(format_table(summarise(evaluation)))
    click.echo(f"\nopen {page} in a browser")


def _run_step(arguments: Sequence[Any]) -> float:
    """Run one of the demo's commands as a user would; return its seconds, or exit as it did."""
    import subprocess

    words = [str(argument) for argument in arguments]
    click.echo(f"\n$ python {' '.join(words)}")
    started = time.perf_counter()
    code = subprocess.run([sys.executable, *words], cwd=PROJECT_ROOT, check=False).returncode
    if code:
        click.echo(f"demo: that step failed with exit code {code}", err=True)
        sys.exit(code)
    return time.perf_counter() - started


@cli.command()
@config_options
@click.option(
    "--annotations", multiple=True, type=directory(dir_okay=False), help="AnyWord json; again for more files."
)
@click.option(
    "--prompts", multiple=True, type=directory(dir_okay=False), help="Prompts JSONL; again for more files."
)
@click.option("--out", type=directory(file_okay=False), required=True, help="The evaluation's folder.")
@click.option(
    "--teacher",
    "grids",
    multiple=True,
    metavar="GRID:STEPS",
    help="upstream:20, trailing:8 ... Default: upstream:20, the recorded solve, trailing:8, trailing:4.",
)
@click.option("--no-teacher", is_flag=True, help="Do not evaluate the teacher.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="[NAME=]RUN", help="A trained student; again for more."
)
@click.option("--truth", is_flag=True, help="Also read the true images, and these through the VAE: the ceiling.")
@click.option(
    "--without",
    multiple=True,
    metavar="PART",
    help="Also the teacher without attnx, caption, color, glyph-embedding, glyph-map or writenet, or without"
    " several: caption+color.",
)
@click.option("--images", type=directory(file_okay=False), help="Only score these images, NAME_0.jpg ...")
def evaluate(
    config: Config,
    annotations: tuple[Path, ...],
    prompts: tuple[Path, ...],
    out: Path,
    grids: tuple[str, ...],
    no_teacher: bool,
    adapters: tuple[str, ...],
    truth: bool,
    without: tuple[str, ...],
    images: Path | None,
) -> None:
    """Measure text accuracy on held-out inputs: teacher and students on the same layouts and noise.

    Images are drawn, read by an independent recogniser, and scored. Run it again to go on after a stop, or to add
    runs to the same folder. With --images nothing is drawn: a folder of images named as AnyText-benchmark names
    them is scored against its annotations.

    Example: pipeline.py evaluate --config configs/tiny.toml --annotations held_out.json --adapter run --out eval
    """
    if not annotations and not prompts:
        raise UsageError("no inputs; give --annotations FILE or --prompts FILE")
    if images is not None:
        draws = {"--truth": truth, "--adapter": adapters, "--teacher": grids, "--no-teacher": no_teacher}
        if others := ", ".join(option for option, value in {**draws, "--without": without}.items() if value):
            raise UsageError(
                f"--images {images}: received {others} too, expected none of these, as only the folder is scored;"
                f" leave {others} out, or leave --images out and give another --out"
            )
        if config.evaluate.fid_weights and not config.evaluate.fid_reference:
            raise UsageError(
                "evaluate.fid_weights: received no evaluate.fid_reference, expected one with --images, as there"
                " are no true images; give --set evaluate.fid_reference=FOLDER, or leave evaluate.fid_weights out"
            )

    from stage2_student.evaluation.invocation import note_invocation
    from stage2_student.evaluation.recognizers import load_recognizer
    from stage2_student.evaluation.results import save_layouts
    from stage2_student.evaluation.runs import evaluate_run
    from stage2_student.evaluation.summary import format_table, summarise

    recognizer = load_recognizer(config.evaluate.recognizer)
    if images is not None:
        plan, settings, runs = _images_to_score(config, annotations, prompts, images)
    else:
        chosen = () if no_teacher else grids or None
        plan, settings, runs = _runs_to_evaluate(
            config, annotations, prompts, chosen, tuple(map(_named_path, adapters)), truth, without
        )
    settings = {**settings, "samples_per_layout": plan.samples_per_layout, "recognizer": recognizer.identity}
    measure = _image_measure(config, out, plan, truth)
    save_layouts(out, plan.layouts, settings)
    note_invocation(out, sys.argv, config.as_dict())
    with StopFlag() as stop:
        for run in runs:
            evaluate_run(run, plan, recognizer, out, stop)
            if measure is not None:
                measure(run, stop)
    summary = summarise(out)
    click.echo(format_table(summary))
    click.echo(f"{summary.lines} lines of {summary.layouts} layouts; everything is in {out}/evaluation.json")


@cli.command()
@click.option("--evaluation", type=directory(file_okay=False), required=True, help="Folder that evaluate wrote.")
@click.option("--run", "runs", multiple=True, type=directory(file_okay=False), help="Training run, for its curve.")
@click.option("--out", type=directory(dir_okay=False), required=True, help="The HTML file.")
@click.option("--examples", type=click.IntRange(min=0), default=12, show_default=True, help="Layouts shown.")
@click.option("--title", default="AnyText2 in few steps: how well text is drawn", help="Heading of the page.")
def report(evaluation: Path, runs: tuple[Path, ...], out: Path, examples: int, title: str) -> None:
    """Write an evaluation as one self-contained HTML page: table, plots, images with what was read, settings.

    Example: pipeline.py report --evaluation demo/evaluation --run demo/run --out demo/report.html
    """
    from stage2_student.report.data import gather
    from stage2_student.report.page import write_report

    write_report(out, gather(evaluation, runs, examples), title)
    click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


def _image_measure(config: Config, out: Path, plan: Plan, truth: bool) -> Callable[[Run, StopFlag], None] | None:
    """Return what computes FID and CLIP score of a run, or None if their weights are not given."""
    evaluation = config.evaluate
    if not evaluation.fid_weights and not evaluation.clip_score_model:
        return None

    from stage1_teacher.inputs.annotations import caption_as_annotated
    from stage2_student.evaluation.image_quality import (
        Reference,
        find_reference,
        kept_images,
        load_clip,
        load_fid,
        measure_quality,
    )
    from stage2_student.evaluation.runs import run_folder

    weights, clip, folder = evaluation.fid_weights, evaluation.clip_score_model, evaluation.fid_reference
    fid_weights = config.resolve(weights, "evaluate.fid_weights") if weights else None
    clip_model = config.resolve(clip, "evaluate.clip_score_model") if clip else None
    truth_run = run_folder(out, TRUE_IMAGES)
    real: Path | Reference = truth_run
    if fid_weights and folder:
        real = find_reference(config.resolve(folder, "evaluate.fid_reference"))
    elif fid_weights and not truth:
        if not truth_run.exists():
            raise UsageError(
                "evaluate.fid_weights: FID compares with the true images; add --truth, or give"
                " evaluate.fid_reference, a folder of images"
            )
        kept_images(truth_run, plan)  # an incomplete set is refused before anything is drawn
    # So is what cannot be loaded.
    if fid_weights:
        load_fid(fid_weights)
    if clip_model:
        load_clip(clip_model)
    captions = {layout.layout_id: caption_as_annotated(layout.caption) for layout in plan.layouts}

    def measure(run: Run, stop: StopFlag) -> None:
        with_itself = run.label == TRUE_IMAGES and not isinstance(real, Reference)
        measure_quality(
            run_folder(out, run.label),
            plan,
            fid_weights=None if with_itself else fid_weights,
            clip_model=clip_model,
            real=real,
            captions=captions,
            stop=stop,
        )

    return measure


def _named_path(text: str) -> tuple[str, Path]:
    """Split [NAME=]PATH; without a name it is the folder's."""
    name, equals, path = text.partition("=")
    if equals and name and "/" not in name:
        return name, Path(path)
    return Path(text).resolve().name, Path(text)


def _images_to_score(
    config: Config, annotations: tuple[Path, ...], prompts: tuple[Path, ...], images: Path
) -> tuple[Plan, dict[str, Any], Iterable[Run]]:
    """Prepare the scoring of images that someone else drew: plan, settings, and the one run."""
    from stage1_teacher.inputs.files import open_inputs
    from stage1_teacher.inputs.fonts import configured_fonts
    from stage1_teacher.measuring.held_out import read_undrawn
    from stage2_student.evaluation.image_folder import count_samples, folder_run
    from stage2_student.evaluation.runs import Plan

    without_images = config.inputs.replace(use_images=False)
    inputs = open_inputs(annotations, prompts, without_images, configured_fonts(config))
    layouts = read_undrawn(inputs, config.inputs.size)
    plan = Plan(
        layouts=layouts,
        samples_per_layout=count_samples(images, layouts),
        batch_size=config.evaluate.batch_size,
        keep_images=config.evaluate.keep_images,
        keep_all=bool(config.evaluate.fid_weights or config.evaluate.clip_score_model),
    )
    return plan, {}, [folder_run(images, images.resolve().name, plan.jobs())]


def _runs_to_evaluate(
    config: Config,
    annotations: tuple[Path, ...],
    prompts: tuple[Path, ...],
    grids: tuple[str, ...] | None,
    adapters: tuple[tuple[str, Path], ...],
    truth: bool,
    without: tuple[str, ...],
) -> tuple[Plan, dict[str, Any], Iterable[Run]]:
    """Compose stage one's inputs and teacher with stage two's students and measurement: plan, settings, runs."""
    from common.anytext2.conditioning import ConditioningBatch
    from common.anytext2.fingerprint import fingerprint
    from stage1_teacher.inputs.files import open_inputs
    from stage1_teacher.measuring.held_out import HeldOut, describe_settings
    from stage1_teacher.measuring.teacher_sampler import default_grids, teacher_drawers
    from stage1_teacher.rendering.rendered_input import DrawSettings
    from stage1_teacher.teacher.teacher import Teacher
    from stage2_student.evaluation.drawers import Drawer, StudentDrawer, drawer_run
    from stage2_student.evaluation.runs import Drawn, Plan, Run
    from stage2_student.student.sample import decode

    @functools.cache
    def load() -> tuple[Teacher, Uncond]:
        teacher = Teacher.load(config)
        return teacher, teacher.unconditional()

    settings = DrawSettings.from_config(config)
    inputs = open_inputs(annotations, prompts, config.inputs, settings.fonts)
    grids = default_grids(config) if grids is None else grids
    held_out = HeldOut(inputs, settings, config.evaluate.num_samples)
    drawers: list[Drawer] = [*teacher_drawers(config, held_out, load, grids, without)]
    for name, path in adapters:
        condition = lambda ids: ConditioningBatch.stack(held_out.encode(load()[0], ids))  # noqa: E731
        drawers.append(StudentDrawer(config, path, name, condition))
    network = config.load_network()
    side = config.inputs.size // network.stride

    def true_images(jobs: Sequence[Job]) -> Drawn:
        return Drawn(images=[held_out.true_image(layout.layout_id) for layout, _ in jobs])

    def through_vae(jobs: Sequence[Job]) -> Drawn:
        teacher, _ = load()
        latents = held_out.reconstruct(teacher, [layout.layout_id for layout, _ in jobs])
        return Drawn(images=decode(teacher.vae, latents))

    def runs() -> Iterator[Run]:
        if truth:
            yield Run(label=TRUE_IMAGES, kind="truth", draw=true_images)
            vae = {"teacher": fingerprint(config.resolve(config.model.checkpoint, "model.checkpoint"), "teacher")}
            yield Run(label="true images through the VAE", kind="vae", draw=through_vae, settings=vae)
        for drawer in drawers:
            yield drawer_run(
                drawer,
                seed=config.evaluate.seed,
                shape=(network.latent_channels, side, side),
                decode=lambda latents: decode(load()[0].vae, latents),
            )

    plan = Plan(
        layouts=held_out.layouts,
        truth=lambda layout: held_out.true_ground(layout.layout_id),
        samples_per_layout=config.evaluate.samples_per_layout,
        batch_size=config.evaluate.batch_size,
        keep_images=config.evaluate.keep_images,
        keep_all=bool(config.evaluate.fid_weights or config.evaluate.clip_score_model),
    )
    shared = {"inputs": describe_settings(config, settings), "seed": config.evaluate.seed}
    return plan, shared, runs()


@cli.command()
@config_options
@click.option("--adapter", type=directory(), required=True, help="A run's folder, a checkpoint, an adapter.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["diffusers", "kohya", "merged"]),
    required=True,
    help="LoRA for diffusers, for kohya's tools, or a whole AnyText2 checkpoint.",
)
@click.option(
    "--out", type=directory(dir_okay=False), required=True, help="A .safetensors file; merged: or .ckpt."
)
def export(config: Config, adapter: Path, kind: str, out: Path) -> None:
    """Hand a student on to other tools.

    `merged` adds the adapter to the checkpoint that --config names and keeps its keys. Sample any of them without
    guidance at the printed timesteps: diffusers' DDIMScheduler with timestep_spacing="trailing" and
    set_alpha_to_one=True has them.

    Example: pipeline.py export --adapter demo/run --format diffusers --out student.safetensors
    """
    from stage2_student.student import export as exporting
    from stage2_student.student.adapter import find_adapter, read_card

    folder = find_adapter(adapter)
    if kind == "merged":
        count = exporting.export_merged(config, folder, out)
    else:
        count = {"diffusers": exporting.export_diffusers, "kohya": exporting.export_kohya}[kind](folder, out)
    card = read_card(folder)
    click.echo(
        f"{out}: {count} adapted modules; {card.num_steps} {card.sampler} steps at t = {list(card.timesteps)}"
    )


if __name__ == "__main__":
    cli()
