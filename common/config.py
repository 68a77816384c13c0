"""The configuration: frozen dataclasses, read from strict TOML.

Hyper-parameters live in TOML; `--set section.key=value` changes one for an invocation. An unknown key is an error
with the nearest known one.
"""

from __future__ import annotations

import difflib
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from common.errors import DataError, UsageError
from common.sections import (
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    PrecomputeConfig,
    ShardsConfig,
    TeacherConfig,
    TrainConfig,
)

__all__ = [
    "PROJECT_ROOT",
    "Config",
    "EvaluateConfig",
    "LoraConfig",
    "ModelConfig",
    "PrecomputeConfig",
    "ShardsConfig",
    "TeacherConfig",
    "TrainConfig",
    "load_config",
]

PROJECT_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration, and where it was read from."""

    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    precompute: PrecomputeConfig = field(default_factory=PrecomputeConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    source: Path | None = None
    """The TOML file, against whose folder relative paths are resolved."""

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

    def as_dict(self) -> dict[str, Any]:
        """Return the resolved configuration as plain values, without the file's path."""
        return {name: values for name, values in asdict(self).items() if name != "source"}


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a TOML file, or None for the defaults.
        overrides: `section.key=value`, the value in TOML's syntax (a bare word is taken as a string).

    Raises:
        UsageError: the file is missing or not TOML, or a section, key, type or value is wrong.
    """
    tables: dict[str, Any] = {}
    where = "--set"
    if path is not None:
        where = str(path)
        try:
            tables = tomllib.loads(path.read_text())
        except FileNotFoundError:
            raise UsageError(f"config file {path}: no such file") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"config file {path}: {error}") from None
    for override in overrides:
        _apply_override(tables, override)
    sections = {f.name: f for f in fields(Config) if f.name != "source"}
    built: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in sections:
            raise UsageError(f"{where}: unknown section [{name}]{_nearest(name, sections)}")
        if not isinstance(table, dict):
            raise UsageError(f"{where}: {name} must be a section, as in [{name}]; received {table!r}")
        factory = typing.cast(Any, sections[name].default_factory)
        built[name] = _build(factory, table, name, where)
    return Config(**built, source=None if path is None else path.resolve())


def _apply_override(tables: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise UsageError(f"--set {override}: expected section.key=value, e.g. --set train.max_steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    target = tables.setdefault(section, {})
    *parents, last = key.split(".")
    for parent in parents:
        target = target.setdefault(parent, {}) if isinstance(target, dict) else {}
    if isinstance(target, dict):
        target[last] = value


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"


def _build(kind: Any, table: dict[str, Any], section: str, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            raise UsageError(f"{where}: unknown key {section}.{key}{_nearest(key, hints)}")
        values[key] = _coerce(value, hints[key], f"{where}: {section}.{key}")
    return kind(**values)


def _coerce(value: Any, hint: Any, what: str) -> Any:
    """Check a TOML value against a field's type; an integer is fine where a float is asked for."""
    origin = typing.get_origin(hint)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if origin is dict and isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return dict(value)
    if origin is None and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    expected = {tuple: "a list of strings", dict: "a table of strings"}.get(origin) or getattr(
        hint, "__name__", hint
    )
    raise UsageError(f"{what}: received {value!r}, expected {expected}")
