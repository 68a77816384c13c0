"""Declare a set complete: everything planned is committed and sound; summary.json says what it holds."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError, MachineError
from common.files import write_bytes_atomic
from shards.files.failures import count_by_reason, read_failures
from shards.files.names import SUMMARY
from shards.files.plan import read_plan
from shards.looking.verify import verify_set
from shards.reading.reader import ShardSet
from shards.records.members import JSON, ROLLOUT
from shards.records.meta import SampleMeta
from shards.records.ranges import Ranges, merge_into, rms

_MEASURED = 64
"""Records, evenly spaced, on which the rounding error is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a complete set holds."""

    set_hash: str
    """Of all its committed shards."""
    identity_sha256: str
    """The manifest's."""
    shards: int
    samples: int
    failed: int
    """Inputs that became no record."""
    failures: dict[str, int]
    """By reason."""
    bytes: int
    """Of all shards."""
    ranges: dict[str, dict[str, float]]
    """Of each tensor: min, max, rms."""
    rounding_error: dict[str, float]
    """rms error that float16 makes: of the recorded states, and of the target x0 of M phases ("phases_4")."""


def finalize(folder: Path, *, quick: bool = False) -> Summary:
    """Check that a set is complete and sound, and write summary.json.

    Args:
        folder: the set's.
        quick: trust sizes, do not hash the shards.

    Raises:
        DataError: shards are missing or damaged; the message names them.
        MachineError: a shard cannot be read.
    """
    shards = ShardSet.open(folder)
    if not quick:
        _check_sound(shards)
    summary = summarise(shards, folder)
    write_bytes_atomic(folder / SUMMARY, json.dumps(dataclasses.asdict(summary), indent=1).encode() + b"\n")
    return summary


def summarise(shards: ShardSet, folder: Path) -> Summary:
    """Sum up a set from its sidecars' headers, its failures and a few records."""
    ranges: Ranges = {}
    for header in shards.headers:
        merge_into(ranges, header.ranges)
    failures = count_by_reason(read_failures(folder))
    planned = read_plan(folder).num_inputs
    if planned and planned != len(shards) + sum(failures.values()):
        raise DataError(
            f"{folder}: {planned} inputs are planned, {len(shards)} are recorded and "
            f"{sum(failures.values())} failed; "
            f"the rest is missing: is a file of {folder / 'failures'} lost?"
        )
    return Summary(
        set_hash=shards.set_hash,
        identity_sha256=shards.manifest.identity_sha256,
        shards=len(shards.headers),
        samples=len(shards),
        failed=sum(failures.values()),
        failures=failures,
        bytes=sum(header.bytes for header in shards.headers),
        ranges={name: {"min": r[0], "max": r[1], "rms": rms(r)} for name, r in sorted(ranges.items())},
        rounding_error=measure_rounding_error(shards),
    )


def measure_rounding_error(shards: ShardSet) -> dict[str, float]:
    """Measure what float16 costs, on records evenly spaced over the set.

    A value between two float16 numbers `spacing` apart is off by spacing / sqrt(12) rms. The solver goes on
    from the rounded state, so a phase's start is exact and only its end carries an error, which the target x0*
    multiplies: it is linear in the end.

    Returns:
        "states", and "phases_M" for each M of 1, 2, 4, 8 whose phases are stored, or for a student's own M; only
        "states" of noised data.
        All in units of latents.
    """
    sums: dict[str, list[float]] = {}
    for index in np.linspace(0, len(shards) - 1, min(_MEASURED, len(shards))).astype(int):
        arrays = shards.arrays(int(index), (ROLLOUT,))
        states = np.abs(arrays["rollout_latents"])
        variance = np.square(np.spacing(states), dtype=np.float64).mean(axis=(0, 2, 3, 4)) / 12  # (S + 1,)
        sums.setdefault("states", []).append(float(variance.mean()))
        meta = SampleMeta.from_json(shards.read_members(int(index), (JSON,))[JSON], JSON)
        timesteps = arrays["rollout_timesteps"]
        if meta.source == "rollout":
            cuts = {m: _even_cuts(len(timesteps), m) for m in (1, 2, 4, 8) if len(timesteps) % m == 0}
        elif meta.source == "student":
            starts = np.arange(0, len(timesteps), 2)
            cuts = {len(starts): (starts, starts + 1)}
        else:
            cuts = {}
        for phases, (start, end) in cuts.items():
            value = _phase_error(timesteps, variance, start, end)
            sums.setdefault(f"phases_{phases}", []).append(value)
    return {name: math.sqrt(sum(values) / len(values)) for name, values in sums.items()}


def _even_cuts(steps: int, phases: int) -> tuple[Any, Any]:
    """Return the first and the last state of each of M phases of equal length."""
    start = np.arange(0, steps, steps // phases)
    return start, start + steps // phases


def _phase_error(timesteps: Any, variance: Any, start: Any, end: Any) -> float:
    """Return the mean variance of the target x0 over phases."""
    import torch

    from common.schedule import make_alphas_cumprod, phase_target_x0

    cumulative = torch.ones(len(timesteps) + 1, dtype=torch.float64)  # (S + 1,)
    cumulative[:-1] = make_alphas_cumprod()[torch.tensor(timesteps)]
    errors = torch.from_numpy(variance).sqrt()  # (S + 1,)
    moved = phase_target_x0(torch.zeros(len(start)), errors[end], cumulative[start], cumulative[end])  # (M,)
    return float(moved.square().mean())


def _check_sound(shards: ShardSet) -> None:
    found = list(verify_set(shards))
    if unread := [damage.message for damage in found if damage.unread]:
        raise MachineError(f"{unread[0]} ({len(unread)} shards could not be read)")
    if found:
        more = f"; and {len(found) - 5} more: see `verify`" if len(found) > 5 else ""
        raise DataError(
            f"damaged: {'; '.join(damage.message for damage in found[:5])}{more}; "
            "run precompute again to write damaged shards anew"
        )
