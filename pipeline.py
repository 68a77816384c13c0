#!/usr/bin/env python3
"""The command line: the only file that prints results and exits.

A stage is imported only inside a command's body: whatever a training worker imports must not hold the teacher.

Exit codes: 0 done; 2 usage, or out of memory; 3 bad input or data, permanent; 74 a fault of the machine that may
pass (disk, permission, network, credentials, shared memory, GPU, a lost process); 75 stopped by a signal with
everything committed (run again); 141 nobody reads the output any more; 1 a bug.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all other imports, which take seconds
    from common.signals import end_at_once

    end_at_once()

import functools
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from common.cli import (
    FILE,
    FOLDER,
    PATH,
    Cli,
    adapter_option,
    config_options,
    input_options,
    out_option,
    refuse_ignored,
    shards_folder_option,
    shards_option,
)
from common.config import PROJECT_ROOT, Config, load_config
from common.errors import DataError, MachineError, UsageError
from common.faults import naming
from common.job import meet_by_slurm, number_tasks, rank
from common.logs import name_task, quieten
from common.passing_on import spell_given, take_options
from common.signals import interrupted_quietly

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
PACKAGES = ("both_stages", "cluster", "common", "shards", "stage1_teacher", "stage2_student")


@click.group(cls=Cli, program="pipeline.py", packages=PACKAGES)
def cli() -> None:
    """Distil AnyText2 into a few-step LoRA student, in two stages that never share a process."""


# Each command below: options here, work in its package.


@cli.command()
@config_options
@input_options
@out_option("Folder of the shards.", FOLDER)
@click.option("--task-index", type=click.IntRange(min=0), help="Which task this is. Default: from the job system.")
@click.option(
    "--num-tasks", type=click.IntRange(min=1), help="Elements of the array, or tasks, that share the work."
)
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first N inputs.")
@click.option("--trajectories", type=FOLDER, help="Keep whole rollouts too, in this folder (zarr).")
@click.option("--upload", metavar="URL", help="Copy each shard there after its commit; any fsspec URL.")
@click.option(
    "--states-from",
    "student",
    type=PATH,
    metavar="ADAPTER",
    help="Record this student's own states, and where the teacher goes from each: a run's folder, or an export.",
)
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
    student: Path | None,
) -> None:
    """Stage one: run the teacher on inputs and record what it does, as shards.

    Run it again to go on after a stop; start it in several tasks to share the work. The task's number and count
    come from a Slurm array and its steps (srun), from a Kubernetes indexed job or from torchrun; with --num-tasks
    an array's element, or a pod, is the task of its own number, so that a part of an array can be run again.

    Example: pipeline.py precompute --config configs/tiny.toml --annotations demo/data.json --out demo/shards
    """
    from shards.looking.status import read_status
    from shards.looking.status_text import summarise
    from stage1_teacher.precompute import precompute as run

    index, count = number_tasks(os.environ, task_index, num_tasks)
    if count > 1:
        name_task(f"task {index}/{count}")
    states = None
    if student is not None:
        from both_stages.student_states import states_from

        config, states = states_from(config, student)
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
        student=states,
    )
    click.echo(
        f"{out}: {done.shards_written} shards written with {done.records} records, {done.shards_found} were there,"
        f" {done.failed} inputs failed"
        + (f" ({done.lacking} of them: no font has their characters)" if done.lacking else "")
        + f"; task {index} of {count}, {done.shards_planned} shards planned in all"
        + (f"; {done.uploaded} shards uploaded to {upload}" if upload else "")
        + f"; the set: {summarise(read_status(out))}"
    )


@cli.command()
@shards_folder_option
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
@shards_folder_option
@click.option("--json", "as_json", is_flag=True, help="One line of JSON, with the missing shards' numbers.")
@click.option(
    "--watch",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="Look again every so often until it is done.",
)
def status(shards: Path, as_json: bool, watch: float | None) -> None:
    """Show how far a running set is: shards done, in work and missing, tasks, failed inputs, rate, time left.

    What is missing comes with the command that makes it.

    Example: pipeline.py status --shards demo/shards --watch 10
    """
    from shards.looking.status import read_status
    from shards.looking.status_text import format_status, status_values

    with interrupted_quietly():
        while True:
            found = read_status(shards)
            lines = [json.dumps(status_values(found), ensure_ascii=False)] if as_json else format_status(found)
            click.echo("\n".join(lines))
            if watch is None or found.is_complete:
                break
            time.sleep(watch)
            if not as_json:
                click.clear() if sys.stdout.isatty() else click.echo()


@cli.command()
@shards_folder_option
def clean(shards: Path) -> None:
    """Remove what dead tasks left in a set: temporary files, claims, notes. Living tasks and all shards stay.

    Tasks of other machines are watched for as long as it takes to be sure, at most a minute and a half.

    Example: pipeline.py clean --shards demo/shards
    """
    from shards.looking.clean import clean as run

    removed = run(shards)
    for name in removed:
        click.echo(f"removed {name}")
    click.echo(f"{shards}: {len(removed)} leftovers of dead tasks removed")


@cli.command()
@shards_option()
@out_option(
    "Make a contact sheet too; needs the teacher's VAE.", PATH, metavar="FILE", required=False, suffixes=IMAGES
)
@click.option("--records", default=4, show_default=True, type=click.IntRange(min=1), help="Rows of the sheet.")
@config_options
def inspect(config: Config, shards: str, out: Path | None, records: int) -> None:
    """Show what is in a set: counts, settings, failures, ranges of every tensor; with --out a picture of records.

    Example: pipeline.py inspect --config configs/tiny.toml --shards demo/shards --out demo/contact_sheet.png
    """
    if out is None:
        refuse_ignored("only the sheet of --out has rows", "records")
    from shards.files.failures import count_by_reason, read_failures
    from shards.looking.inspect import describe_set
    from shards.reading.reader import ShardSet

    found = ShardSet.open(shards, allow_incomplete=True)
    failures = {} if "://" in shards else count_by_reason(read_failures(Path(shards)))
    for line in describe_set(found, failures):
        click.echo(line)
    if out is not None:
        from shards.looking.contact_sheet import make_contact_sheet
        from stage2_student.student.sample import decode, load_decoder

        step = max(len(found) // records, 1)
        rows = [found[index] for index in range(0, len(found), step)][:records]
        sheet = make_contact_sheet(rows, functools.partial(decode, load_decoder(config)))
        out.parent.mkdir(parents=True, exist_ok=True)
        with naming(out):
            sheet.save(out)
        click.echo(f"{out}")


@cli.command()
@shards_folder_option
@click.option("--to", "url", required=True, metavar="URL", help="Where, e.g. s3://bucket/set; any fsspec URL.")
def upload(shards: Path, url: str) -> None:
    """Copy what is committed to a URL, each shard's sidecar last; run it again, any time, for what came since.

    Example: pipeline.py upload --shards demo/shards --to s3://bucket/set
    """
    from shards.remote.upload import upload_set

    click.echo(f"{url}: {len(upload_set(shards, url))} shards uploaded")


@cli.command()
@shards_option()
@click.option("--recompute", type=click.IntRange(min=1), metavar="N", help="Run the teacher again on N records.")
@click.option("--tolerance", default=5e-2, show_default=True, help="Largest difference that --recompute accepts.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="That hash; 0 for one per core.")
@config_options
def verify(config: Config, shards: str, recompute: int | None, tolerance: float, threads: int) -> None:
    """Check every hash and checksum of a set and name all damage; with --recompute N ask the teacher too.

    Exits with 3 if anything is damaged, with 74 if something can't be read, so that nothing is known of it.

    Example: pipeline.py verify --shards demo/shards
    """
    if recompute is None:
        refuse_ignored("only --recompute compares with it", "tolerance")
    from shards.looking.verify import audit

    found, damages, unread = audit(shards, num_threads=threads)
    for line in (*damages, *unread):
        click.echo(line)
    if unread:
        raise MachineError(
            f"{shards}: {len(unread)} files could not be read, {len(damages)} damages found, listed above;"
            " mend the disk or the connection, then verify again"
        )
    if damages or found is None:
        count = f"{len(damages)} damage{'s' * (len(damages) != 1)} found"
        remedy = "" if found is None else "; run precompute again to mend the shards"
        raise DataError(f"{shards}: {count}, listed above{remedy}")
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
@shards_option()
@out_option("The run's folder.", FOLDER)
@click.option(
    "--resume",
    default="none",
    show_default=True,
    metavar="none|auto|CHECKPOINT",
    help="auto: go on from the newest complete checkpoint, or start if there is none.",
)
@click.option(
    "--from",
    "ancestor",
    type=PATH,
    metavar="ADAPTER",
    help="Start from another run's adapter; its steps, order and optimizer begin anew.",
)
@click.option(
    "--held-out", metavar="DIR_OR_URL", help="Log the loss on this set of records, which are not trained on, too."
)
@click.option(
    "--max-minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Stop after so long as a signal would: checkpoint, exit 75.",
)
@click.option("--allow-incomplete", is_flag=True, help="Train on what is committed although more is planned.")
@click.option("--exclude-damaged", is_flag=True, help="Leave damaged samples out; the set is then another one.")
def train(
    config: Config,
    shards: str,
    out: Path,
    resume: str,
    ancestor: Path | None,
    held_out: str | None,
    max_minutes: float | None,
    allow_incomplete: bool,
    exclude_damaged: bool,
) -> None:
    """Train a student from shards alone; no part of the teacher is loaded.

    On many GPUs and nodes start it by srun alone, torchrun or accelerate launch. --from takes a run, a checkpoint
    or an adapter's folder, of the same base and [lora]; of a run that keeps an average of its weights
    (train.ema_decay), the average. With --resume auto it counts until the run has a checkpoint.

    Example: pipeline.py train --config configs/tiny.toml --shards demo/shards --out demo/run --resume auto
    """
    meet_by_slurm(os.environ)
    if (own := rank(os.environ)) or "RANK" in os.environ:
        name_task(f"rank {own}")
    if own:
        quieten()
    from stage2_student.train import train as run_training

    result = run_training(
        config,
        shards=shards,
        run=out,
        resume=resume,
        ancestor=ancestor,
        held_out=held_out,
        max_minutes=max_minutes,
        allow_incomplete=allow_incomplete,
        exclude_damaged=exclude_damaged,
        announce=click.echo,
    )
    if rank(os.environ) == 0:
        loss = "" if result.loss is None else f", loss {result.loss:.4g}"
        click.echo(f"{result.steps} steps done{loss}; checkpoint {result.checkpoint}")


@cli.command()
@config_options
@click.option("--shards", type=FOLDER, required=True, help="Folder of the set, there already or not.")
@click.option("--inputs", type=click.IntRange(min=1), metavar="N", help="Of the set. Default: those of its plan.")
@click.option(
    "--upload", metavar="URL", help="Where shards are to be copied: write, read and remove a file there."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def doctor(config: Config, shards: Path, inputs: int | None, upload: str | None, as_json: bool) -> None:
    """Look in seconds for what a machine or a cluster lacks; run it where the jobs will run.

    Tries the set's folder (rename, hard links, flock, space), shared memory, threads, checkpoint, tokenizer,
    fonts, a bucket's credentials and the GPU. Ends with 0 if nothing is in the way (warnings are not), else with
    the code that a command would end with on the first fault: 2, 3 or 74.

    Example: pipeline.py doctor --config configs/tiny.toml --shards demo/shards --inputs 96
    """
    from both_stages.doctor.examine import examine_all, worst

    findings = []
    for finding in examine_all(config, shards, inputs=inputs, url=upload):
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.level:<8} {finding.check:<14} {finding.said}")
    if as_json:
        values = {"exit_code": worst(findings), "findings": [asdict(finding) for finding in findings]}
        click.echo(json.dumps(values, ensure_ascii=False))
    sys.exit(worst(findings))


@cli.group()
def submit() -> None:
    """Have precompute or train run as jobs of Slurm or Kubernetes.

    They take the options of the command itself. What each job gets stands in the section [cluster] of the
    configuration. Scripts or manifests, and the jobs' logs, lie in the folder jobs of the set or run.

    Example: pipeline.py submit precompute --num-tasks 16 --config configs/sd15.toml --annotations data.json
    --out shards/laion --train runs/phased4
    """


JOBS_OPTION = click.option(
    "--jobs", type=FOLDER, help="Folder of scripts, manifests and logs. Default: the folder jobs in --out."
)
SHOW_OPTION = click.option("--dry-run", is_flag=True, help="Print what would be submitted and stop.")
SETTINGS = ("config_path", "overrides")


@submit.command("precompute")
@click.option("--num-tasks", type=click.IntRange(min=1), required=True, help="Tasks that share the work.")
@click.option("--throttle", type=click.IntRange(min=1), help="Tasks that run at a time. Default: all.")
@click.option("--missing", is_flag=True, help="At most as many tasks as there are shards missing; see status.")
@click.option("--train", "run", type=FOLDER, help="Then train on the set, into this folder.")
@JOBS_OPTION
@SHOW_OPTION
def submit_precompute(
    out: Path,
    num_tasks: int,
    throttle: int | None,
    missing: bool,
    run: Path | None,
    jobs: Path | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Submit precompute as an array of tasks, then finalize, and then train where --train says so.

    The set is finalized whatever becomes of the array, as tasks make each other's shards; training waits for a
    complete set. Nothing waits for ever. Submit again at any time: what is committed is skipped.

    Example: pipeline.py submit precompute --num-tasks 16 --config configs/sd15.toml --annotations data.json
    --out shards/laion --dry-run
    """
    from cluster.job import Tasks
    from cluster.submission import find_jobs_folder, make_chain
    from cluster.submission import submit as send

    if not options["annotations"] and not options["prompts"]:
        raise UsageError("no inputs; give --annotations FILE or --prompts FILE")
    config = load_config(options["config_path"], options["overrides"])
    elsewhere = config.cluster.system == "kubernetes"
    spell = functools.partial(
        spell_given, click.get_current_context(), precompute, elsewhere=elsewhere, without=("dry_run", "num_tasks")
    )
    if missing:
        from shards.looking.status import read_status

        found = read_status(out)
        if found.shards_planned and not found.missing:
            click.echo(f"{out}: no shard is missing, nothing is submitted")
            return
        num_tasks = min(num_tasks, len(found.missing) or num_tasks)
    student = spell(only=("student",))  # whose states are recorded is who learns from them
    chain = make_chain(
        spell(),
        (*spell(only=SETTINGS), *(("--from", student[1]) if student else ())),
        out=out.absolute(),
        jobs=find_jobs_folder(jobs, out, elsewhere=elsewhere),
        run=run and run.absolute(),
        run_jobs=find_jobs_folder(jobs, run or out, elsewhere=elsewhere),
    )
    tasks = Tasks(num_tasks=num_tasks, throttle=throttle)
    for line in send(config, chain, tasks=tasks, dry_run=dry_run):
        click.echo(line)


@submit.command("train")
@click.option("--after", default="", metavar="JOB", help="Slurm: wait until this job ended well.")
@JOBS_OPTION
@SHOW_OPTION
def submit_train(out: Path, after: str, jobs: Path | None, dry_run: bool, **options: Any) -> None:
    """Submit train as one job, that goes on after each interruption (--resume auto).

    Example: pipeline.py submit train --config configs/sd15.toml --shards shards/laion --out runs/phased4 --dry-run
    """
    from cluster.job import Job
    from cluster.submission import find_jobs_folder
    from cluster.submission import submit as send

    config = load_config(options["config_path"], options["overrides"])
    elsewhere = config.cluster.system == "kubernetes"
    words = spell_given(click.get_current_context(), train, elsewhere=elsewhere, without=("dry_run",))
    folder = find_jobs_folder(jobs, out, elsewhere=elsewhere)
    job = Job(command="train", options=(*words, "--resume", "auto"), folder=out.absolute(), jobs=folder)
    for line in send(config, [job], after=after, dry_run=dry_run):
        click.echo(line)


take_options(submit_precompute, precompute, without=("task_index",))
take_options(submit_train, train, without=("resume",))


@cli.command()
@config_options
@click.argument("run", type=FOLDER)
@click.option("--held-out", required=True, metavar="DIR_OR_URL", help="A set that was not trained on.")
@click.option(
    "--records",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="How many of it to measure on, the first ones.",
)
@click.option("--once", is_flag=True, help="End when every checkpoint that is there is measured.")
def watch(config: Config, run: Path, held_out: str, records: int, once: bool) -> None:
    """Measure the checkpoints of a training run, as they come: endpoint error, text, colours, and images.

    Start it before, beside or after `train`, on this machine or on another that sees the folder RUN; it ends when
    training is done. RUN/watch/index.html shows the curves and images and reloads itself, RUN/watch/strip.png the
    images alone, RUN/watch/log.jsonl has the figures. RUN/best is the adapter of lowest endpoint error, which
    --adapter takes.

    Example: pipeline.py watch demo/run --config configs/tiny.toml --held-out demo/held_out_shards
    """
    from stage2_student.watch import watch as run_watching

    done = run_watching(config, run, held_out=held_out, records=records, once=once)
    best = "" if done.best is None else f"; {run}/best is step {done.best.step}"
    click.echo(f"{done.page}: {len(done.measured)} checkpoints measured, {done.new} of them now{best}")


@cli.command()
@config_options
@adapter_option("Sample with a student: a run's folder, a checkpoint, an adapter, an export.", required=False)
@click.option("--teacher", "with_teacher", is_flag=True, help="Sample with the teacher: DDIM with guidance.")
@click.option(
    "--compare", is_flag=True, help="With --adapter: the teacher's picture of the same noise to its left."
)
@click.option("--prompt", help='Caption; the texts to show stand in it between "...", “...” or «...».')
@click.option(
    "--box", "boxes", multiple=True, metavar="X0,Y0,X1,Y1", help="Where each text goes, pixels; again for more."
)
@click.option(
    "--text", "texts", multiple=True, help="The text of each --box; the prompt's marks then mean nothing."
)
@click.option("--color", "colors", multiple=True, metavar="#RRGGBB", help="Of each text, or one for all.")
@click.option("--font", help="A configured font's name, or a font file.")
@click.option("--image", type=FILE, help="Edit this image instead of generating one.")
@click.option("--prompts", type=FILE, help="Sample each line of a prompts JSONL, as precompute takes it.")
@click.option("--record", type=click.IntRange(min=0), help="Take the conditioning of a record of --shards.")
@shards_option("With --record: its set.", required=False)
@click.option("--steps", type=click.IntRange(min=1), help="Of the teacher; a student has its own number.")
@click.option("--seed", type=int, help="Keys the noise. Default: 0; of a record, the noise that the teacher had.")
@click.option(
    "--num-images", type=click.IntRange(min=1), default=1, show_default=True, help="Each of other noise."
)
@click.option("--size", metavar="WxH", help="Of the images, multiples of 64 in the released model.")
@out_option("PNG file, with a number if there are more; of --prompts a folder of them.", PATH)
@click.option("--grid", type=FILE, help="Also one PNG file of all images.")
def sample(
    config: Config,
    adapter: Path | None,
    with_teacher: bool,
    prompt: str | None,
    prompts: Path | None,
    record: int | None,
    shards: str | None,
    out: Path,
    **options: Any,
) -> None:
    """Sample images: with the teacher or a student, from a prompt with boxes, a file of prompts, or a record.

    From a record a student needs no part of the teacher; --compare then shows the teacher's picture as recorded.
    Each PNG says in its metadata what it shows, of which seed and model.

    Example: pipeline.py sample --config configs/tiny.toml --adapter demo/run --prompt 'a sign that says "OPEN"'
    --box 8,32,88,64 --out open.png
    """
    if (adapter is None) != with_teacher:
        raise UsageError("who samples? Give one of --adapter RUN and --teacher; --compare puts both side by side")
    if sum(what is not None for what in (prompt, prompts, record)) != 1 or (record is None) != (shards is None):
        raise UsageError(
            "sample what? Give --prompt with a --box for each text, or --prompts, or --record with --shards"
        )
    typed = {name: options.pop(name) for name in ("texts", "boxes", "colors", "font", "image")}
    if prompt is None:
        refuse_ignored("a record, or a line of --prompts, says it itself", *typed)
    if record is not None:
        refuse_ignored("a record has its own", "size")
    from both_stages.sample_files import sample_files
    from both_stages.sampling import Prompt, RecordOf

    asked: Prompt | RecordOf | Path | None = prompts
    if prompt is not None:
        asked = Prompt(text=prompt, **typed)
    elif shards is not None and record is not None:
        asked = RecordOf(shards=shards, index=record)
    assert asked is not None
    for path in sample_files(config, asked, out, adapter=adapter, **options):
        click.echo(f"{path}")


@cli.command()
@config_options
@click.option(
    "--adapter", "adapters", multiple=True, metavar="[NAME=]RUN", help="A student, or its export; again for more."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 is everywhere.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0: any free one.")
@click.option("--max-seconds", type=click.FloatRange(min=1), default=300, show_default=True, help="Of a request.")
@click.option("--max-waiting", type=click.IntRange(min=1), default=8, show_default=True, help="Requests at once.")
def serve(
    config: Config, adapters: tuple[str, ...], host: str, port: int, max_seconds: float, max_waiting: int
) -> None:
    """Sample in a browser: drag boxes for texts on a picture, generate or edit, two models side by side.

    The teacher is always there, students are those of --adapter. The page is for this machine alone unless --host
    says otherwise; it has no passwords. It needs the extra [page] and loads nothing from elsewhere.

    Example: pipeline.py serve --config configs/tiny.toml --adapter demo/run
    """
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise UsageError("the page needs the extra [page]: pip install '.[page]'") from None
    from both_stages.evaluating import named_path
    from both_stages.page.asked import Limits
    from both_stages.page.server import serve as run

    students = dict(map(named_path, adapters))
    if len(students) < len(adapters):
        raise UsageError("--adapter: two students have one name; give NAME=RUN")
    limits = Limits(max_seconds=max_seconds, max_waiting=max_waiting)
    run(config, students, host=host, port=port, limits=limits, announce=click.echo)


@cli.command()
@shards_option("A set of rollouts.")
@adapter_option("A student's run, checkpoint or adapter, or its export; again for more.", multiple=True)
@click.option("--records", default="0,1,2,3", show_default=True, metavar="I,J,...", help="Which records to show.")
@out_option("PNG file.", PATH, metavar="FILE", suffixes=[".png"])
@config_options
def compare(config: Config, shards: str, adapters: tuple[Path, ...], records: str, out: Path) -> None:
    """Show layout, teacher and students side by side, from the same noise, for some records.

    The teacher is shown as recorded, and before each student in as few steps: what it draws undistilled.

    Example: pipeline.py compare --config configs/tiny.toml --shards demo/shards --adapter demo/run --out out.png
    """
    try:
        indices = [int(part) for part in records.split(",")]
    except ValueError:
        raise UsageError(f"--records: received {records!r}, expected numbers such as 0,1,2") from None
    from common.pictures import write_png
    from shards.reading.reader import ShardSet
    from stage2_student.student.compare import compare as make_sheet

    write_png(out, make_sheet(config, ShardSet.open(shards, allow_incomplete=True), adapters, indices))
    click.echo(f"{out}")


@cli.command()
@out_option("Folder for everything.", PATH, required=False, default=Path("demo"), show_default=True)
@click.option("--count", type=click.IntRange(min=8), default=96, show_default=True, help="Inputs to generate.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Training steps of each student."
)
@click.option(
    "--layouts", type=click.IntRange(min=4), default=24, show_default=True, help="Held-out ones, measured."
)
@click.option("--quick", is_flag=True, help="The same with 24 inputs, 40 steps and 8 layouts.")
def demo(out: Path, count: int, steps: int, layouts: int, quick: bool) -> None:
    """Run everything on the embedded tiny teacher: minutes on a CPU, no download.

    It trains a student of 1 step and one of 4, and shows and measures them beside the teacher in as many steps
    and in 40. It runs the ordinary commands, and prints each, so that you can run them yourself. Run again, it
    goes on; other counts or steps need another --out.

    Example: pipeline.py demo --out demo
    """
    from both_stages.demo import describe_gain, plan_demo
    from stage2_student.evaluation.summary import summarise
    from stage2_student.evaluation.text_table import format_table

    if quick:
        refuse_ignored("--quick sets it", "count", "steps", "layouts")
        count, steps, layouts = 24, 40, 8
    plan = plan_demo(out, count=count, steps=steps, layouts=layouts)
    seconds = {}
    for step in plan:
        click.echo(f"\n$ python {' '.join(step.arguments)}")
        started = time.perf_counter()
        if code := step.run():
            click.echo(f"demo: that step failed with exit code {code}", err=True)
            sys.exit(code)
        seconds[step.name] = time.perf_counter() - started
    click.echo(f"\n{'what was done':<18}{'seconds':>9}  where it is")
    for step in plan:
        click.echo(f"{step.name:<18}{seconds[step.name]:>9.1f}  {step.result}")
    click.echo(f"{'all':<18}{sum(seconds.values()):>9.1f}\n")
    results = {step.name: step.result for step in plan}
    summary = summarise((PROJECT_ROOT / results["evaluate"]).parent)
    click.echo(format_table(summary) + "\n")
    for line in describe_gain(summary):
        click.echo(line)
    click.echo(f"\nlook at {results['compare']}, and open {results['report']} in a browser")


@cli.command()
@config_options
@input_options
@out_option("The evaluation's folder.", FOLDER)
@click.option(
    "--teacher",
    "grids",
    multiple=True,
    metavar="GRID:STEPS[@S]",
    help="upstream:20, trailing:8 ..., @S for guidance S instead of the usual. Default: upstream:20, the recorded"
    " solve, trailing:8, 4, 2 and 1, and 4, 2 and 1 @1: without guidance, a UNet call a step as a student.",
)
@click.option("--no-teacher", is_flag=True, help="Do not evaluate the teacher.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="[NAME=]RUN", help="A student, or its export; again for more."
)
@click.option("--truth", is_flag=True, help="Also read the true images, and these through the VAE: the ceiling.")
@click.option(
    "--without",
    multiple=True,
    metavar="PART",
    help="Also the teacher without attnx, caption, color, glyph-embedding, glyph-map or writenet, or without"
    " several: caption+color.",
)
@click.option("--images", type=FOLDER, help="Only score these images, NAME_0.jpg ...")
@click.option(
    "--held-out",
    metavar="DIR_OR_URL",
    help="Sample the records of this set, each from its recorded noise, and measure against their solves.",
)
@click.option("--trajectories", type=FOLDER, help="With --held-out: its whole rollouts, for errors along the way.")
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
    held_out: str | None,
    trajectories: Path | None,
) -> None:
    """Measure teacher and students on held-out inputs: the same layouts and noise for all.

    Images are sampled, compared with those of the teacher's own full solve from the same noise (endpoint error,
    PSNR), read by an independent judge, and scored. Run it again to go on after a stop, or to add runs to the same
    folder. With --images nothing is sampled: a folder of images named as AnyText-benchmark names them is scored
    against its annotations. With --held-out layouts, conditioning, noise and solves are a recorded set's.

    Example: pipeline.py evaluate --config configs/tiny.toml --annotations held_out.json --adapter run --out eval
    """
    if held_out is not None:
        because = "the records of --held-out say what is sampled, and their conditioning is whole"
        refuse_ignored(because, "annotations", "prompts", "truth", "without", "images")
    elif trajectories is not None:
        refuse_ignored("they belong to the set of --held-out", "trajectories")
    from both_stages.evaluating import evaluate as run
    from both_stages.evaluating import named_path
    from both_stages.evaluation_parts import Question
    from stage2_student.evaluation.text_table import format_table

    question = Question(
        annotations=annotations,
        prompts=prompts,
        grids=grids,
        no_teacher=no_teacher,
        adapters=tuple(map(named_path, adapters)),
        truth=truth,
        without=without,
        images=images,
        held_out=held_out,
        trajectories=trajectories,
    )
    summary = run(config, question, out, sys.argv)
    click.echo(format_table(summary))
    click.echo(f"{summary.lines} lines of {summary.layouts} layouts; everything is in {out}/evaluation.json")


@cli.command()
@click.option("--evaluation", type=FOLDER, required=True, help="Folder that evaluate wrote.")
@click.option("--run", "runs", multiple=True, type=FOLDER, help="Training run, for its curve.")
@out_option("The HTML file.", FILE, suffixes=[".html", ".htm"])
@click.option("--examples", type=click.IntRange(min=0), default=12, show_default=True, help="Layouts shown.")
@click.option("--title", default="AnyText2 in few steps: how well text comes out", help="Heading of the page.")
def report(evaluation: Path, runs: tuple[Path, ...], out: Path, examples: int, title: str) -> None:
    """Write an evaluation as one self-contained HTML page: table, plots, images with what was read, settings.

    Example: pipeline.py report --evaluation demo/evaluation --run demo/run --out demo/report.html
    """
    from stage2_student.report.data import gather
    from stage2_student.report.page import write_report

    write_report(out, gather(evaluation, runs, examples), title)
    click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


@cli.command()
@config_options
@adapter_option()
@click.option(
    "--format",
    "kind",
    type=click.Choice(["diffusers", "kohya", "merged", "adapter", "diffusers-pipeline"]),
    required=True,
    help="LoRA for diffusers, for kohya's tools; a whole AnyText2 checkpoint; the adapter's folder; a folder that"
    " diffusers loads without this program.",
)
@out_option("A .safetensors file; merged: or .ckpt; adapter, diffusers-pipeline: a folder.", PATH)
@click.option("--evaluation", type=FOLDER, help="That evaluate wrote: its table goes into the model card.")
@click.option("--base-model", metavar="NAME", help="Of the base on a hub, for the model card.")
def export(
    config: Config, adapter: Path, kind: str, out: Path, evaluation: Path | None, base_model: str | None
) -> None:
    """Hand a student on to other tools, with a model card (README.md) beside it.

    `merged` adds the adapter to the checkpoint that --config names and keeps its keys. `kohya` puts WriteNet's
    adapters into a file of their own beside --out. Sample any of them without guidance at the printed timesteps,
    which each file's metadata has too; a merged student of train.grid = "upstream" runs in AnyText2's own program.
    docs/exports.md says which tool takes which.

    Example: pipeline.py export --adapter demo/run --format diffusers --out student/student.safetensors
    """
    from both_stages.exporting import hand_on

    done = hand_on(config, adapter, kind, out, evaluation=evaluation, base=base_model)
    card = done.card
    steps = f"steps = {card.num_steps}, cfg_scale = 1"
    own = f"; in AnyText2's own program: {steps}" if card.grid == "upstream" and kind == "merged" else ""
    click.echo(
        f"{', '.join(map(str, done.files))}: {done.modules} adapted modules; {card.num_steps} {card.sampler} steps"
        f" at t = {list(card.timesteps)}{own}"
    )


if __name__ == "__main__":
    cli()
