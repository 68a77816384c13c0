"""Which settings a run may change when it is resumed, and which would make it another run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.config import Config

HARMLESS = frozenset(
    {
        "batch_size",  # batch_size x processes is noted instead
        "checkpoint_every",
        "deterministic",
        "fold_adapters",
        "gradient_checkpointing",
        "keep_adapters",
        "held_out_every",
        "held_out_samples",
        "keep_checkpoints",
        "log_every",
        "max_steps",  # unless the learning rate depends on it
        "num_workers",
        "tracker_project",
        "trackers",
    }
)
"""Keys of [train] that do not change what is learnt."""

ROUNDING = ("model.channels_last", "model.compile", "train.deterministic", "train.fold_adapters")
"""Keys, false by default, that change how results are rounded and nothing else: a run may go on with others, and
is told that its bits will not be those of a run that never stopped."""

ONLY_IF_SET: dict[str, Any] = {
    "critic_learning_rate": 3e-3,
    "critic_text_weight": 1.0,
    "critic_weight": 0.0,
    "draws_per_sample": 1,
    "grid": "trailing",
    "perceptual_text_weight": 1.0,
    "perceptual_weight": 0.0,
    "unrolled_phase_weight": 0.1,
}
"""Keys that came later, and what runs begun before have."""

IDLE_WITHOUT = {
    "train.critic_weight": ("train.critic_learning_rate", "train.critic_text_weight"),
    "train.perceptual_weight": ("train.perceptual_text_weight",),
}
"""Keys that say nothing where another one is 0."""

_GLOBAL_BATCH, _ACCUMULATION = "global_batch (train.batch_size x processes)", "train.gradient_accumulation"


def comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity with all keys that say something, and the samples of a step in one figure.

    How ranks and micro batches split these is free.

    The samples of a step are one piece of the stream of samples, and its loss is their mean, in any split.
    """
    rest = {f"train.{key}": value for key, value in ONLY_IF_SET.items()} | dict(identity)
    for weight, idle in IDLE_WITHOUT.items():
        for key in () if rest[weight] else idle:
            del rest[key]
    samples = rest.pop(_GLOBAL_BATCH, 0) * rest.pop(_ACCUMULATION, 1)
    return {**rest, "samples a step (train.batch_size x train.gradient_accumulation x processes)": samples}


def rounded_otherwise(config: Config, before: Mapping[str, Any]) -> list[str]:
    """Return which settings round otherwise than before, e.g. "train.fold_adapters = true".

    Args:
        config: the resolved configuration.
        before: that of the run so far, as `Config.as_dict` gives it, maybe in a version without some of the keys.
    """
    now, changed = config.as_dict(), []
    for key in ROUNDING:
        section, name = key.split(".")
        if now[section][name] != before.get(section, {}).get(name, False):
            changed.append(f"{key} = {str(now[section][name]).lower()}")
    return changed


def identity_of_run(
    config: Config, *, world: int, base_fingerprint: str, set_hash: str, ancestor: str | None = None
) -> dict[str, Any]:
    """Return the settings that decide what a run learns, as JSON values by dotted key.

    Args:
        config: the resolved configuration.
        world: processes that train together.
        base_fingerprint: of the checkpoint.
        set_hash: of the frozen shards.
        ancestor: hash of the adapter that the run was started from, or None if it started fresh.
    """
    values = config.as_dict()
    train = {key: value for key, value in values["train"].items() if key not in HARMLESS}
    train = {k: v for k, v in train.items() if k not in ONLY_IF_SET or v != ONLY_IF_SET[k]}
    if config.train.schedule != "constant":
        train["max_steps"] = config.train.max_steps
    found: dict[str, Any] = {f"train.{key}": value for key, value in train.items()}
    found |= {f"lora.{key}": value for key, value in values["lora"].items()}
    if ancestor is not None:
        found["ancestor"] = ancestor
    return found | {
        "model.dtype": config.model.dtype,
        "shards.window_shards": config.shards.window_shards,
        _GLOBAL_BATCH: config.train.batch_size * world,
        "base_fingerprint": base_fingerprint,
        "set_hash": set_hash,
    }
