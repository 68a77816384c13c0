from __future__ import annotations

import pytest

from common.differences import find_differences, require_same
from common.errors import DataError


def test_every_leaf_that_differs_is_named_with_both_values() -> None:
    received = {"train": {"seed": 1, "rate": 0.5}, "size": [64, 64], "same": (1, 2), "new": True}
    expected = {"train": {"seed": 2, "rate": 0.5}, "size": [64, 96], "same": [1, 2], "old": None}
    assert find_differences(received, expected) == [
        "new: received true, expected none",
        "old: received none, expected null",
        "size: received [64, 64], expected [64, 96]",
        "train.seed: received 1, expected 2",
    ]


def test_a_refusal_says_what_where_and_the_remedy_and_counts_what_it_does_not_name() -> None:
    require_same({"a": 1}, {"a": 1}, "DIR: made with other settings", "use another folder")
    ours, theirs = ({f"k{i:02d}": i + shift for i in range(12)} for shift in (0, 1))
    with pytest.raises(DataError) as raised:
        require_same(ours, theirs, "DIR: made with other settings", "use another folder")
    text = str(raised.value)
    assert text.startswith("DIR: made with other settings (k00: received 0, expected 1; k01: ")
    assert text.endswith("; k07: received 7, expected 8 and 4 more); use another folder")


def test_a_long_value_is_cut_short() -> None:
    (text,) = find_differences({"long": "x" * 500}, {"long": ""})
    assert text.endswith('... (502 characters), expected ""') and len(text) < 120
