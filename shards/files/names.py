"""Names of everything in a set's folder.

manifest.json            identity and provenance of the set, made once
uncond.safetensors       the unconditional contexts, made once, before the manifest
plan/000000.txt          which inputs go into which shards; one file per extension of the set
shard-000012.tar         a shard: one webdataset sample per input
shard-000012.json        its sidecar: written last, it makes the shard committed
failures/shard-000012.jsonl  inputs of that shard that failed
summary.json             written by `finalize`
.work/                   what tasks tell each other; no part of the set, never read by who reads it
.NAME.HOST.ID.tmp, .lock     a running writer's; never read

In .work: tasks/ (a note of each running task), claims/ (what each works on), stops/ (shards on which tasks were
stopped), index/ (where every input lies), planned/ (which inputs the plan has), command.json (how it is made).
"""

from __future__ import annotations

import re

SCHEMA = 1
"""Version of everything named here; a reader refuses another."""

MANIFEST = "manifest.json"
UNCOND = "uncond.safetensors"
SUMMARY = "summary.json"
PLAN_DIR = "plan"
FAILURES_DIR = "failures"
LOCK = ".lock"
WORK_DIR = ".work"
TASKS_DIR, CLAIMS_DIR, STOPS_DIR = f"{WORK_DIR}/tasks", f"{WORK_DIR}/claims", f"{WORK_DIR}/stops"
INDEX_DIR, PLANNED_DIR = f"{WORK_DIR}/index", f"{WORK_DIR}/planned"
COMMAND = f"{WORK_DIR}/command.json"
FROZEN = "shards.json"
"""In a run's folder: the set that the run trains on."""

MAX_SAMPLES = 10**9
"""Sample keys have nine digits."""

_SIDECAR = re.compile(r"shard-(\d{6})\.json")
_SHARD = re.compile(r"shard-(\d{6})\.tar")


def shard_name(shard_index: int) -> str:
    """Return a shard's file name."""
    if not 0 <= shard_index < 10**6:
        raise ValueError(f"shard index {shard_index}: expected 0 to 999999; use more samples per shard")
    return f"shard-{shard_index:06d}.tar"


def sidecar_name(shard: str) -> str:
    """Return the sidecar's file name for a shard's file name."""
    return shard.removesuffix(".tar") + ".json"


def failures_name(shard: str) -> str:
    """Return the path, inside the set's folder, of the list of failed inputs of a shard."""
    return f"{FAILURES_DIR}/{shard.removesuffix('.tar')}.jsonl"


def parse_shard_name(name: str) -> int | None:
    """Return the index in a shard's file name, None for any other name."""
    match = _SHARD.fullmatch(name)
    return int(match[1]) if match else None


def parse_sidecar_name(name: str) -> int | None:
    """Return the index in a sidecar's file name, None for any other name."""
    match = _SIDECAR.fullmatch(name)
    return int(match[1]) if match else None


def sample_key(sample_index: int) -> str:
    """Return the webdataset key of an input: nine digits, no dot (a dot would end the key)."""
    if not 0 <= sample_index < MAX_SAMPLES:
        raise ValueError(f"sample index {sample_index}: expected 0 to {MAX_SAMPLES - 1}")
    return f"{sample_index:09d}"
