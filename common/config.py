"""The configuration: checked sections, read from strict TOML.

Hyper-parameters live in TOML; `--set section.key=value` changes one for an invocation. An unknown key is an error
with the nearest known one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from common.anytext2.config import NetworkConfig, load_network_config
from common.cluster_settings import ClusterConfig
from common.errors import DataError, UsageError
from common.sections import (
    EvaluateConfig,
    InputsConfig,
    LoraConfig,
    ModelConfig,
    PrecomputeConfig,
    ShardsConfig,
    TeacherConfig,
    TrainConfig,
)
from common.toml import Section, build, read_toml

PROJECT_ROOT = Path(__file__).resolve().parent.parent

MOVED = (
    {f"teacher.{key}": f"inputs.{key}" for key in ("font", "fonts", "font_hint_prob")}
    | {
        f"precompute.{key}": f"inputs.{key}"
        for key in (
            "edit_fraction",
            "ignore_fields",
            "max_chars",
            "max_lines",
            "random_fonts",
            "size",
            "use_images",
            "watermark_threshold",
        )
    }
    | {"precompute.draw_workers": "precompute.render_workers", "evaluate.recognizer": "evaluate.judge"}
)
"""Where keys of earlier versions are now."""


class Config(Section):
    """The whole configuration, and where it was read from."""

    model: ModelConfig = ModelConfig()
    teacher: TeacherConfig = TeacherConfig()
    inputs: InputsConfig = InputsConfig()
    precompute: PrecomputeConfig = PrecomputeConfig()
    shards: ShardsConfig = ShardsConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    source: Annotated[Path | None, Field(exclude=True)] = None
    """The TOML file, against whose folder relative paths are resolved. No TOML value can be one."""

    def resolve(self, path: str, key: str) -> Path:
        """Find a file or folder named in the configuration.

        Args:
            path: absolute, or relative to the TOML file's folder or to the project's root.
            key: the configuration key, for the error.

        Raises:
            UsageError: the value is empty.
            DataError: nothing is there.
        """
        if not path:
            raise UsageError(f"config {key} is empty; set it in the TOML file or with --set {key}=PATH")
        bases = [PROJECT_ROOT] if self.source is None else [self.source.parent, PROJECT_ROOT]
        tried = list(dict.fromkeys((base / Path(path).expanduser()).resolve() for base in bases))
        for candidate in tried:
            if candidate.exists():
                return candidate
        raise DataError(f"config {key}: no file or folder {path!r}; looked at {', '.join(map(str, tried))}")

    def find_checkpoint(self) -> Path:
        """Return the file or folder that `model.checkpoint` names; raises as `resolve`."""
        return self.resolve(self.model.checkpoint, "model.checkpoint")

    def load_network(self) -> NetworkConfig:
        """Return the sizes of the network that `model.network` names.

        Raises:
            UsageError: its file is not one of a network.
            DataError: its file is missing.
        """
        name = self.model.network
        return load_network_config(name if name == "sd15" else self.resolve(name, "model.network"))

    def as_dict(self) -> dict[str, Any]:
        """Return the resolved configuration as JSON values, without the file's path."""
        return self.model_dump(mode="json")


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a TOML file, or None for the defaults.
        overrides: `section.key=value`, the value in TOML's syntax (a bare word is taken as a string).

    Raises:
        UsageError: the file is missing or not TOML, or a section, key, type or value is wrong.
    """
    tables = {} if path is None else read_toml(path, "config file")
    overridden = [_apply_override(tables, override) for override in overrides]
    where = "--set" if path is None else str(path)
    config = build(Config, tables, where, overridden=overridden, moved=MOVED)
    return config if path is None else config.replace(source=path.resolve())


def _apply_override(tables: dict[str, Any], override: str) -> str:
    """Put a value into the tables; returns its dotted key."""
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise UsageError(f"--set {override}: expected section.key=value, e.g. --set train.max_steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    target: Any = tables
    *parents, last = (section, *key.split("."))
    for parent in parents:
        target = target.setdefault(parent, {}) if isinstance(target, dict) else {}
    if isinstance(target, dict):
        target[last] = value
    return name.strip()
