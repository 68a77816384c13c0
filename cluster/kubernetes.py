"""Manifests for kubectl: an Indexed Job of `precompute`, and one pod each for `finalize` and `train`.

They need Kubernetes 1.33 or later (backoffLimitPerIndex). Values are written as JSON, which YAML is a superset of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from cluster.job import Job, Tasks, pinned
from common.cluster_settings import ClusterConfig
from common.errors import DataError, UsageError

CONFIG_MOUNT = "/etc/anytext2-distill"
"""Where pods find the configuration file."""
FS_GROUP = 1000
"""Of the image's user, so that it can write to the claims."""


def render_precompute(settings: ClusterConfig, job: Job, tasks: Tasks, config: str | None) -> str:
    """Return the manifest of an Indexed Job whose indices are tasks of `precompute`.

    Args:
        settings: of the section [cluster].
        job: its folder is the pods'.
        tasks: how many; an Indexed Job cannot leave any out.
        config: text of the configuration file, which becomes a ConfigMap; None without one.

    Raises:
        UsageError: the set would lie in a folder of one pod, that goes with it.
    """
    _require_claim(settings, job)
    words = ["python", "pipeline.py", job.command, *job.options, "--num-tasks", str(tasks.num_tasks)]
    pod = _pod(settings, job, words, gpus=settings.gpus, has_config=config is not None)
    at_a_time = min(tasks.throttle or tasks.num_tasks, tasks.num_tasks)
    return _manifest(settings, job, pod, config, completions=tasks.num_tasks, parallelism=at_a_time)


def render_finalize(settings: ClusterConfig, job: Job) -> str:
    """Return the manifest of the one pod that checks a set."""
    words = ["python", "pipeline.py", job.command, *job.options]
    return _manifest(settings, job, _pod(settings, job, words, gpus=0, has_config=False), None)


def render_train(settings: ClusterConfig, job: Job, config: str | None) -> str:
    """Return the manifest of a training in one pod, with as many ranks as `train_processes`.

    Raises:
        UsageError: the run would lie in a folder that goes with its pod.
    """
    _require_claim(settings, job)
    ranks = settings.train_processes
    launcher = ["torchrun", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else ["python"]
    words = [*launcher, "pipeline.py", job.command, *job.options]
    has_config = config is not None
    pod = _pod(settings, job, words, gpus=settings.gpus * ranks, has_config=has_config, processes=ranks)
    return _manifest(settings, job, pod, config)


def _manifest(
    settings: ClusterConfig,
    job: Job,
    pod: Sequence[str],
    config: str | None,
    *,
    completions: int = 1,
    parallelism: int = 1,
) -> str:
    return "\n".join(
        [
            f"# {job.command} of {job.folder}.",
            "# Made by `pipeline.py submit`. What is committed is skipped: submit again, as often as you like.",
            *([] if config is None else _config_map(job, config)),
            "apiVersion: batch/v1",
            "kind: Job",
            f"metadata: {{name: {job.name}}}",
            "spec:",
            "  completionMode: Indexed  # each index is tried again by itself",
            f"  completions: {completions}",
            f"  parallelism: {parallelism}",
            f"  backoffLimitPerIndex: {settings.retries}",
            "  podFailurePolicy:  # in order; the first rule that fits counts",
            "    rules:",
            "    # Eviction, preemption, a drained node: not the work's fault, tried again without being counted.",
            "    - action: Ignore",
            '      onPodConditions: [{type: DisruptionTarget, status: "True"}]',
            "    # A wrong option or setting is the same for every index.",
            "    - action: FailJob",
            f"      onExitCodes: {{containerName: main, operator: In, values: [{UsageError.exit_code}]}}",
            "    # Bad data does not pass by trying again.",
            "    - action: FailIndex",
            f"      onExitCodes: {{containerName: main, operator: In, values: [{DataError.exit_code}]}}",
            "    # All else is counted per index: 75 too, for a probe or a sidecar may send signals for ever.",
            "  template:",
            "    spec:",
            *(f"      {line}" for line in pod),
            "",
        ]
    )


def _pod(
    settings: ClusterConfig, job: Job, words: Sequence[str], *, gpus: int, has_config: bool, processes: int = 1
) -> list[str]:
    """Return the lines of a pod's specification."""
    memory = f"{int(settings.memory[:-1]) * processes}{settings.memory[-1]}i"
    resources: dict[str, Any] = {"cpu": str(settings.cpus * processes), "memory": memory}
    if gpus:
        resources[settings.gpu_resource] = gpus
    mounts = [{"name": _volume_name(claim), "mountPath": folder} for folder, claim in settings.volumes.items()]
    volumes: list[dict[str, Any]] = [
        {"name": _volume_name(claim), "persistentVolumeClaim": {"claimName": claim}}
        for claim in dict.fromkeys(settings.volumes.values())
    ]
    if has_config:
        mounts.append({"name": "config", "mountPath": CONFIG_MOUNT})
        volumes.append({"name": "config", "configMap": {"name": job.name}})
    environment = [{"name": name, "value": value} for name, value in pinned(settings).items()]
    return [
        *_optional("serviceAccountName", settings.service_account),
        *_optional("nodeSelector", settings.node_selector),
        f"securityContext: {{fsGroup: {FS_GROUP}}}  # lets the image's user write to the claims",
        "restartPolicy: Never  # so that every end of a pod is judged by the rules above",
        f"terminationGracePeriodSeconds: {settings.warning_seconds}  # one batch and 60 s",
        "containers:",
        "- name: main",
        f"  image: {json.dumps(settings.image)}",
        "  command:",
        *(f"  - {json.dumps(word, ensure_ascii=False)}" for word in words),
        "  env:  # the number of threads decides the last bits of results",
        *(f"  - {json.dumps(entry)}" for entry in environment),
        *([f"  envFrom: [{{secretRef: {{name: {json.dumps(settings.secret)}}}}}]"] if settings.secret else []),
        f"  resources: {json.dumps({'requests': resources, 'limits': resources})}",
        *_list("  volumeMounts", mounts),
        *_list("volumes", volumes),
    ]


def _config_map(job: Job, text: str) -> list[str]:
    return [
        "apiVersion: v1",
        "kind: ConfigMap",
        f"metadata: {{name: {job.name}}}",
        "data:",
        "  config.toml: |",
        *(f"    {line}".rstrip() for line in text.splitlines()),
        "---",
    ]


def _optional(key: str, value: str | Mapping[str, str]) -> list[str]:
    return [f"{key}: {json.dumps(value)}"] if value else []


def _list(key: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    indent = " " * (len(key) - len(key.lstrip()))
    return [f"{key}:", *(f"{indent}- {json.dumps(entry)}" for entry in entries)] if entries else []


def _volume_name(claim: str) -> str:
    return f"claim-{claim.replace('.', '-')}"[:63]


def _require_claim(settings: ClusterConfig, job: Job) -> None:
    here = PurePosixPath(job.folder)
    if not any(here.is_relative_to(mount) for mount in settings.volumes):
        also = "; --upload URL copies it to a bucket" if job.command == "precompute" else ""
        raise UsageError(
            f"--out {job.folder} lies in no folder of cluster.volumes, so each pod would have its own and lose it;"
            f" put it into one, on a claim that all pods share{also}"
        )
