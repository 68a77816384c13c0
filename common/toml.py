"""Settings from TOML: tables that check themselves, and the one loader of configuration and network files."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import UsageError
from common.faults import raise_disk_fault

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "float_type": "a number",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "int",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "too_long": "{max_length} or fewer values",
    "too_short": "{min_length} or more values",
    "tuple_type": "a list",
}
"""What a value should have been, by pydantic's type of error; of others its own words are shorter."""


class Section(BaseModel):
    """A table of settings: no unknown keys, no silent conversions, no NaN, and never changed in place."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    def replace(self, **changes: Any) -> Self:
        """Return a checked copy with other values.

        Raises:
            pydantic.ValidationError: a key or value is wrong.
        """
        return type(self).model_validate({**dict(self), **changes})


T = TypeVar("T", bound=Section)
Count = Annotated[int, Field(ge=1)]


def require(condition: bool, key: str, received: object, expected: str) -> None:
    """Refuse a value that does not go with the section's others; for validators of whole sections.

    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(f"{key}: received {received!r:.200}, expected {expected}")


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file: UTF-8 whatever the locale, with or without a byte order mark.

    Args:
        path: the file.
        what: names the kind of file in errors.

    Raises:
        UsageError: it is missing, unreadable or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"{what} {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path}: {error}; save the file as UTF-8") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise_disk_fault(error, path)
        raise UsageError(f"{what} {path}: {error}") from None


def build(
    kind: type[T],
    tables: Mapping[str, Any],
    where: str,
    *,
    overridden: Collection[str] = (),
    moved: Mapping[str, str] | None = None,
) -> T:
    """Make settings of what a file says.

    Args:
        kind: of settings.
        tables: TOML values.
        where: names the file in errors.
        overridden: dotted keys that --set gave instead of the file.
        moved: former dotted keys, and where they are now.

    Raises:
        UsageError: a key or value is wrong; one line says which, and what was expected.
    """
    try:
        return kind.model_validate(tables)
    except ValidationError as error:
        found = error.errors(include_url=False)
        gone = [key for each in found if (key := _dotted(each["loc"])) in (moved or {})]
        key = gone[0] if gone else _dotted(found[0]["loc"])
        place = "--set" if any(f"{key}.".startswith(f"{name}.") for name in overridden) else where
        if moved and gone:
            said = "; ".join(f"{key} has moved to {moved[key]}" for key in gone)
        else:
            said = describe(error, kind)
        raise UsageError(f"{place}: {said}") from None


def describe(failure: ValidationError, kind: type[Section] | None = None) -> str:
    """Say in one line what pydantic found first: the key, what was received, what was expected.

    Args:
        failure: pydantic's.
        kind: of settings, to name known keys beside an unknown one.
    """
    error = failure.errors(include_url=False)[0]
    key, received, context = _dotted(error["loc"]), error["input"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden" if kind is not None:
            name = f"section [{key}]" if isinstance(received, dict) else f"key {key}"
            return f"unknown {name}{_nearest(error['loc'], kind)}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"key {key} is missing"
        case "json_invalid":
            return str(error["msg"])
        case "model_type":
            return f"{key} must be a section, as in [{key}]; received {received!r}"
        case "value_error":  # of `require`
            return ".".join(part for part in (key, str(context["error"])) if part)
        case other if other in _EXPECTED:
            return f"{key}: received {received!r:.200}, expected {_EXPECTED[other].format(**context)}"
    return f"{key}: received {received!r:.200}, expected {error['msg'].removeprefix('Input should be ')}"


def _dotted(loc: Sequence[int | str]) -> str:
    return ".".join(map(str, loc))


def _nearest(loc: Sequence[int | str], kind: Any) -> str:
    """Return the known key that is most like an unknown one, or all."""
    for section in loc[:-1]:
        kind = kind.model_fields[section].annotation
    names = sorted(name for name, field in kind.model_fields.items() if not field.exclude)
    close = difflib.get_close_matches(str(loc[-1]), names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"
