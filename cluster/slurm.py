"""Scripts for sbatch: each can be read, changed and submitted again as it stands."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from cluster.job import Job, Tasks, pinned, spell_options
from common.cluster_settings import ClusterConfig
from common.config import PROJECT_ROOT
from common.errors import MachineError, Stopped

WITHOUT_COMMIT = 3
"""Slices in a row that end without a new commit, after which a job is given up."""
WAIT_SECONDS = 300
"""So long after a rank of `train` ended the others are ended: they wait for one that died."""


def render_precompute(settings: ClusterConfig, job: Job, tasks: Tasks, array: range) -> str:
    """Return the script of an array whose elements are these tasks of `precompute`."""
    throttle = "" if tasks.throttle is None else f"%{tasks.throttle}"
    directives = [
        f"--array=0-{len(array) - 1}{throttle}",
        _log(job, "%A_%a"),
        *_resources(settings, processes=1),
        *_slices(settings),
    ]
    index = f"$((SLURM_ARRAY_TASK_ID + {array.start}))" if array.start else "$SLURM_ARRAY_TASK_ID"
    lines = [*spell_options(job.options), f"--num-tasks {tasks.num_tasks}", f'--task-index "{index}"']
    return "\n".join(
        [
            *_head(settings, job, directives, f"tasks {array.start} to {array.stop - 1} of {tasks.num_tasks}"),
            *_command(settings, job, lines),
            "me=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}",
            "# What is committed: shards have a sidecar.",
            f"committed() {{ find {_quote(job.folder)} -maxdepth 1 -name 'shard-*.json' | wc -l; }}",
            "",
            *_run(settings, job, ["--ntasks=1", f"--cpus-per-task={settings.cpus}"]),
            "",
        ]
    )


def render_train(settings: ClusterConfig, job: Job) -> str:
    """Return the script of a training: one step with all ranks, which find each other by Slurm's variables."""
    directives = [
        _log(job, "%j"),
        f"--nodes={settings.train_nodes}",
        *_resources(settings, processes=settings.train_processes),
        *_slices(settings),
    ]
    ranks = settings.train_nodes * settings.train_processes
    step = [f"--ntasks={ranks}", f"--cpus-per-task={settings.cpus}", f"--wait={WAIT_SECONDS}"]
    return "\n".join(
        [
            *_head(settings, job, directives, f"{ranks} rank{'s' * (ranks > 1)}"),
            *_command(settings, job, spell_options(job.options)),
            "me=$SLURM_JOB_ID",
            "# What is committed: the newest checkpoint's name.",
            f"committed() {{ find {_quote(job.folder)}/checkpoints -maxdepth 1 -name 'step-*' -printf '%f\\n'"
            " 2>/dev/null | sort | tail -n 1 | grep . || echo none; }",
            "",
            *_run(settings, job, step),
            "",
        ]
    )


def render_finalize(settings: ClusterConfig, job: Job) -> str:
    """Return the script that checks a set: no GPU, no slices."""
    cpu = settings.replace(gpus=0, partition=settings.cpu_partition or settings.partition)
    directives = [_log(job, "%j"), *_resources(cpu, processes=1)]
    return "\n".join(
        [
            *_head(cpu, job, directives, "reads every shard"),
            *_command(cpu, job, spell_options(job.options)),
            f"{_launch(cpu, job, ['--ntasks=1', f'--cpus-per-task={cpu.cpus}'])}",
            "",
        ]
    )


def _head(settings: ClusterConfig, job: Job, directives: list[str], about: str) -> list[str]:
    shell = "#!/bin/bash -l" if settings.modules else "#!/bin/bash"  # a login shell knows `module`
    chosen = {"partition": settings.partition, "account": settings.account, "qos": settings.qos}
    directives = [
        f"--job-name={job.name}",
        *(f"--{name}={value}" for name, value in chosen.items() if value),
        *directives,
        *settings.options,
    ]
    return [
        shell,
        *(f"#SBATCH {directive}" for directive in directives),
        f"# {job.command} of {job.folder}: {about}. Made by `pipeline.py submit`.",
        "# What is committed is skipped: give this file to sbatch again, as often as you like.",
        "",
        "# The number of threads decides the last bits of results.",
        "export " + " ".join(f"{name}={value}" for name, value in pinned(settings).items()),
        *(f"module load {shlex.quote(module)} || exit {MachineError.exit_code}" for module in settings.modules),
        *settings.setup,
        f"cd {_quote(PROJECT_ROOT)} || exit {MachineError.exit_code}",
        "",
    ]


def _resources(settings: ClusterConfig, *, processes: int) -> list[str]:
    kind = f"{settings.gpu_type}:" if settings.gpu_type else ""
    amount, unit = int(settings.memory[:-1]), settings.memory[-1]
    return [
        f"--ntasks-per-node={processes}",
        f"--cpus-per-task={settings.cpus}",
        f"--mem={amount * processes}{unit}",
        *([f"--gres=gpu:{kind}{settings.gpus * processes}"] if settings.gpus else []),
        f"--time={settings.time}",
        "--open-mode=append",
    ]


def _slices(settings: ClusterConfig) -> list[str]:
    """Return the directives of a job that goes on after its limit: a warning ahead of it reaches the steps."""
    return ["--requeue", f"--signal=TERM@{settings.warning_seconds}"]


def _command(settings: ClusterConfig, job: Job, lines: list[str]) -> list[str]:
    python = settings.python or ("python" if settings.container else sys.executable)
    first = f"{shlex.quote(python)} pipeline.py {job.command}"
    if settings.container and settings.container_runtime == "apptainer":
        gpu = " --nv" if settings.gpus else ""
        binds = "".join(f" --bind {shlex.quote(mount)}" for mount in _mounts(settings, job))
        first = (
            f"apptainer exec{gpu}{binds} --pwd {_quote(PROJECT_ROOT)} {shlex.quote(settings.container)} {first}"
        )
    return ["command=(", *(f"  {line}" for line in [first, *lines]), ")"]


def _mounts(settings: ClusterConfig, job: Job) -> list[str]:
    return [str(PROJECT_ROOT), str(job.folder), *settings.container_mounts]


def _launch(settings: ClusterConfig, job: Job, step: list[str]) -> str:
    if settings.container and settings.container_runtime == "pyxis":
        mounts = ",".join(m if ":" in m else f"{m}:{m}" for m in _mounts(settings, job))
        step = [*step, f"--container-image={shlex.quote(settings.container)}"]
        step += [f"--container-mounts={shlex.quote(mounts)}", f"--container-workdir={_quote(PROJECT_ROOT)}"]
    return f'srun {" ".join(step)} "${{command[@]}}"'


def _run(settings: ClusterConfig, job: Job, step: list[str]) -> list[str]:
    """Return the lines that run the command as a step, and have the job go on in a new slice after 75."""
    remedy = "raise cluster.time; for a new set, or a new run, make samples_per_shard or checkpoint_every smaller"
    return f"""\
# As a step: that is what Slurm's signals reach. One that comes to this script is handed on, as USR1, for srun
# takes TERM for an order to kill.
{_launch(settings, job, step)} &
step=$!
trap 'kill -USR1 "$step" 2>/dev/null' TERM INT HUP USR1
stops={shlex.quote(f"{job.jobs}/{job.command}")}-$me.stops
[ -e "$stops" ] || committed > "$stops"
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
if [ "$code" != {Stopped.exit_code} ]; then
  rm -f "$stops"
  exit "$code"
fi

# Stopped by a signal, with everything committed: go on in a new slice. Not if that leads nowhere, nor if Slurm
# itself is ending this job, by scancel say.
committed >> "$stops"
slices=$(($(wc -l < "$stops") - 1))
kinds=$(tail -n {WITHOUT_COMMIT + 1} "$stops" | sort -u | wc -l)
if [ "$slices" -ge {WITHOUT_COMMIT} ] && [ "$kinds" = 1 ]; then
  echo "given up: {WITHOUT_COMMIT} slices without a new commit; {remedy}" >&2
  exit {MachineError.exit_code}
fi
if [ "$slices" -ge {settings.max_requeues} ]; then
  echo "given up after $slices slices (cluster.max_requeues); submit it again to go on" >&2
  exit {MachineError.exit_code}
fi
state=$(squeue --noheader --job="$me" --format=%T)
if [ "$state" = RUNNING ] && scontrol requeue "$me"; then
  sleep 300  # until Slurm ends this script
fi
exit {Stopped.exit_code}
""".splitlines()


def _log(job: Job, number: str) -> str:
    return f'--output="{str(job.jobs).replace("%", "%%")}/{job.command}-{number}.log"'


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
