"""Two sets of settings that should be the same: where they differ, and the one way to refuse."""

from __future__ import annotations

import json
from typing import Any

from common.errors import DataError
from common.files import canonical_json

_MAX_NAMED = 8
_MAX_CHARACTERS = 80


def find_differences(received: Any, expected: Any, key: str = "") -> list[str]:
    """Name the leaves in which two JSON values differ, as `section.key: received X, expected Y`.

    Compared as JSON: a tuple and a list of the same items are equal, 1 and 1.0 are not.
    """
    if isinstance(received, dict) and isinstance(expected, dict):
        found = []
        for name in sorted(received.keys() | expected.keys()):
            dotted = f"{key}.{name}" if key else name
            if name not in expected:
                found.append(f"{dotted}: received {_short(received[name])}, expected none")
            elif name not in received:
                found.append(f"{dotted}: received none, expected {_short(expected[name])}")
            else:
                found.extend(find_differences(received[name], expected[name], dotted))
        return found
    if canonical_json(received) == canonical_json(expected):
        return []
    return [f"{key}: received {_short(received)}, expected {_short(expected)}"]


def require_same(received: Any, expected: Any, what: str, remedy: str) -> None:
    """Refuse settings that differ from those that were there before.

    Args:
        received: JSON values, those of now.
        expected: likewise, those of before.
        what: says where, and what follows from a difference, e.g. "DIR: the set was made with other settings".
        remedy: what to do about it.

    Raises:
        DataError: they differ; up to eight differences are named.
    """
    if found := find_differences(received, expected):
        more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
        raise DataError(f"{what} ({'; '.join(found[:_MAX_NAMED])}{more}); {remedy}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:60]}... ({len(text)} characters)"
