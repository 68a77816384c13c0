"""Which settings a run may change when it is resumed, and which would make it another run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.config import Config
from common.errors import DataError

HARMLESS = frozenset(
    {
        "batch_size",  # batch_size x processes is compared instead, as global_batch
        "checkpoint_every",
        "gradient_checkpointing",
        "keep_checkpoints",
        "log_every",
        "max_steps",  # unless the learning rate depends on it
        "num_workers",
    }
)
"""Keys of [train] that do not change what is learnt."""


def identity_of_run(config: Config, *, world: int, base_fingerprint: str, set_hash: str) -> dict[str, Any]:
    """Return the settings that decide what a run learns, as JSON values by dotted key.

    Args:
        config: the resolved configuration.
        world: processes that train together.
        base_fingerprint: of the checkpoint.
        set_hash: of the frozen shards.
    """
    values = config.as_dict()
    train = {key: value for key, value in values["train"].items() if key not in HARMLESS}
    if config.train.schedule == "cosine":
        train["max_steps"] = config.train.max_steps
    found: dict[str, Any] = {f"train.{key}": value for key, value in train.items()}
    found |= {f"lora.{key}": value for key, value in values["lora"].items()}
    return found | {
        "model.dtype": config.model.dtype,
        "shards.window_shards": config.shards.window_shards,
        "global_batch (train.batch_size x processes)": config.train.batch_size * world,
        "base_fingerprint": base_fingerprint,
        "set_hash": set_hash,
    }


def require_same(ours: Mapping[str, Any], saved: Mapping[str, Any], where: object) -> None:
    """Refuse to go on with settings that would make another run.

    Raises:
        DataError: names every setting that differs.
    """
    changed = [
        f"{key}: was {saved.get(key)!r}, is {ours.get(key)!r}"
        for key in sorted(ours.keys() | saved.keys())
        if ours.get(key) != saved.get(key)
    ]
    if changed:
        raise DataError(
            f"{where}: cannot be resumed with other settings ({'; '.join(changed)}); restore them, or start a new"
            " run in another --out folder"
        )
