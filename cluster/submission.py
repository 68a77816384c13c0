"""What one `submit` comes to: files, in the order in which they are sent, and what each waits for."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import kubernetes, slurm
from cluster.job import JOBS_DIR, Job, Tasks
from cluster.sending import DEFAULT_MAX_ARRAY_SIZE, ask_max_array_size, call_kubectl, call_sbatch, dependent
from common.cluster_settings import ClusterConfig
from common.config import Config
from common.errors import UsageError
from common.faults import naming
from common.files import write_bytes_atomic


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One script or manifest."""

    job: Job
    file: Path
    text: str
    waits: str = ""
    """Slurm: the condition on all parts before it, e.g. "afterok"; empty for none."""


def find_jobs_folder(jobs: Path | None, folder: Path, *, elsewhere: bool) -> Path:
    """Return where scripts, manifests and logs go: in the set's or run's folder, unless another is given.

    Raises:
        UsageError: that folder is the pods', and not here.
    """
    if jobs is not None:
        return jobs.absolute()
    if elsewhere and not folder.parent.is_dir():
        raise UsageError(f"--out {folder} is a folder of the pods, and not here; say by --jobs where manifests go")
    return folder.absolute() / JOBS_DIR


def make_chain(
    options: Sequence[str],
    settings_options: Sequence[str],
    *,
    out: Path,
    jobs: Path,
    run: Path | None,
    run_jobs: Path,
) -> list[Job]:
    """Return `precompute`, `finalize`, and `train` on the set where a run's folder is given.

    Args:
        options: of `precompute`, see `Job.options`.
        settings_options: those of them that give the configuration, for `train`, and what it starts from.
        out: the set's folder.
        jobs: where the set's scripts go.
        run: the run's folder, or None.
        run_jobs: where the run's scripts go.
    """
    chain = [
        Job(command="precompute", options=tuple(options), folder=out, jobs=jobs),
        Job(command="finalize", options=("--shards", str(out)), folder=out, jobs=jobs),
    ]
    if run is not None:
        more = (*settings_options, "--shards", str(out), "--out", str(run), "--resume", "auto")
        chain.append(Job(command="train", options=more, folder=run, jobs=run_jobs))
    return chain


def submit(
    config: Config,
    chain: Sequence[Job],
    *,
    tasks: Tasks | None = None,
    after: str = "",
    dry_run: bool = False,
) -> Iterator[str]:
    """Submit a chain of jobs, or only show it; yields lines for people.

    Args:
        config: its section [cluster] is used; its file goes along to Kubernetes.
        chain: jobs, each after the one before.
        tasks: of `precompute`, if that is among them.
        after: Slurm: id of a job that the first waits for, or empty.
        dry_run: only show.

    Raises:
        UsageError: settings and jobs do not fit, or the system refused one.
        MachineError: the system does not answer, or a file cannot be written.
    """
    settings = config.cluster
    if settings.system == "slurm":
        parts = plan_slurm(settings, chain, tasks, ask_max_array_size() or DEFAULT_MAX_ARRAY_SIZE)
        yield from show(parts) if dry_run else send_slurm(parts, after)
        return
    if after:
        raise UsageError("--after is Slurm's; on Kubernetes wait by kubectl wait")
    stamp = time.strftime("%m%d-%H%M%S")
    parts = plan_kubernetes(settings, chain, tasks, config.source, stamp)
    yield from show(parts) if dry_run else send_kubernetes(settings, parts)


def plan_slurm(
    settings: ClusterConfig, chain: Sequence[Job], tasks: Tasks | None, max_array_size: int
) -> list[Part]:
    """Return the parts of a chain: `precompute`, `finalize`, `train`, or only some of them.

    `finalize` runs whatever becomes of the array, for tasks make each other's shards; it says whether the set is
    complete, and `train` waits for that.
    """
    parts = []
    for job in chain:
        if job.command == "precompute":
            assert tasks is not None
            arrays = tasks.split(max_array_size)
            for number, array in enumerate(arrays):
                name = f"{job.command}-{number}" if len(arrays) > 1 else job.command
                text = slurm.render_precompute(settings, job, tasks, array)
                parts.append(Part(job=job, file=job.jobs / f"{name}.sbatch", text=text))
        else:
            finalizing = job.command == "finalize"
            text = (slurm.render_finalize if finalizing else slurm.render_train)(settings, job)
            waits = "" if job is chain[0] else "afterany" if finalizing else "afterok"
            parts.append(Part(job=job, file=job.jobs / f"{job.command}.sbatch", text=text, waits=waits))
    return parts


def plan_kubernetes(
    settings: ClusterConfig, chain: Sequence[Job], tasks: Tasks | None, config: Path | None, stamp: str
) -> list[Part]:
    """Return one manifest for each job.

    Args:
        settings: of the section [cluster].
        chain: in order.
        tasks: of `precompute`.
        config: the configuration's file here, which goes along.
        stamp: makes the jobs' names new: a Job that ended keeps its own.

    Raises:
        UsageError: there is no image, a path is none of the pods', or what is made would go with its pod.
    """
    if not settings.image:
        raise UsageError(
            "cluster.image is empty; build it from the Dockerfile and name it as the cluster pulls it"
        )
    text = None if config is None else _read(config)
    parts = []
    for given in chain:
        job = replace(given, suffix=f"-{stamp}", options=_in_pods(given.options))
        if job.command == "precompute":
            assert tasks is not None
            manifest = kubernetes.render_precompute(settings, job, tasks, text)
        elif job.command == "finalize":
            manifest = kubernetes.render_finalize(settings, job)
        else:
            manifest = kubernetes.render_train(settings, job, text)
        parts.append(Part(job=job, file=job.jobs / f"{job.command}.yaml", text=manifest))
    return parts


def _in_pods(options: tuple[str, ...]) -> tuple[str, ...]:
    there, words = f"{kubernetes.CONFIG_MOUNT}/config.toml", list(options)
    for index, word in enumerate(words):
        if word == "--config":
            words[index + 1] = there
    return tuple(words)


def _read(path: Path) -> str:
    with naming(path):
        return path.read_text(encoding="utf-8-sig")


def show(parts: Sequence[Part]) -> Iterator[str]:
    """Yield the lines of all files, each under its name and with what it waits for."""
    for part in parts:
        waits = f", {part.waits} of what comes before" if part.waits else ""
        yield f"# {part.file}{waits}"
        yield part.text


def send_slurm(parts: Sequence[Part], after: str = "") -> Iterator[str]:
    """Write the scripts, submit each, and say what became of it.

    Args:
        parts: of the chain.
        after: id of a job that the first must wait for, or empty.

    Raises:
        UsageError: Slurm refused a script; those before it are submitted.
        MachineError: Slurm does not answer, or a file cannot be written.
    """
    before: list[str] = []  # what a part with a condition waits for
    ids: list[str] = []
    condition = "afterok"
    for part in parts:
        if part.waits:
            before, ids, condition = ids, [], part.waits
        _write(part)
        waits_for = ":".join(before) if part.waits else after
        job_id = call_sbatch(part.file, dependent(waits_for, condition) if waits_for else [])
        ids.append(job_id)
        waiting = f", {condition} of {waits_for.replace(':', ', ')}" if waits_for else ""
        yield f"{part.job.command}: job {job_id}{waiting}; {part.file}, log beside it"


def send_kubernetes(settings: ClusterConfig, parts: Sequence[Part]) -> Iterator[str]:
    """Write the manifests, create the first, and say how the others follow. Raises as `send_slurm`."""
    namespace = f" --namespace {shlex.quote(settings.namespace)}" if settings.namespace else ""
    for part in parts:
        _write(part)
    first, *others = parts
    yield f"{call_kubectl(first.file, settings.namespace)}; {first.file}"
    for before, part in zip(parts, others, strict=False):
        wait = f"kubectl{namespace} wait --for=condition=complete --timeout=-1s job/{before.job.name}"
        yield f"then: {wait} && kubectl{namespace} create --filename {shlex.quote(str(part.file))}"


def _write(part: Part) -> None:
    with naming(part.file):
        part.file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(part.file, part.text.encode())
