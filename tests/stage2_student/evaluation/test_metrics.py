from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from stage2_student.evaluation.metrics import Grouped, estimate, fold, levenshtein, ned, paired_difference


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("你好啊", "你啊", 1),
        ("ab", "ba", 2),
    ],
)
def test_levenshtein_counts_edits(a: str, b: str, distance: int) -> None:
    assert levenshtein(a, b) == levenshtein(b, a) == distance


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
def test_levenshtein_is_a_distance(a: str, b: str, c: str) -> None:
    assert (levenshtein(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


def test_ned_is_the_published_formula() -> None:
    assert ned("OPEN", "0PEN") == 1 - 1 / (4 + 1e-5)
    assert ned("OPEN", "OPEN") == 1
    assert ned("A", "") == pytest.approx(1e-5, rel=0.01)
    assert ned("", "") == 1


def test_folding_drops_case_width_and_spaces_and_nothing_else() -> None:
    assert fold("New Yｏrk ") == fold("newyork")
    assert fold("0") != fold("O")
    assert fold("ｶﾞ") == fold("ガ") and fold("A\u3000B") == fold("ab")
    assert fold("CO²") != fold("co2") and fold("①") != fold("1")


def test_texts_that_look_the_same_are_the_same() -> None:
    assert ned("Cafe\u0301", "Caf\u00e9") == ned("Café", "Café") == pytest.approx(1, abs=1e-4)
    assert ned("CO²", "CO2") < 1


def grouped(values: dict[str, list[float]]) -> Grouped:
    pairs = [(name, value) for name, scores in values.items() for value in scores]
    return Grouped.of([name for name, _ in pairs], [value for _, value in pairs])


def test_the_estimate_is_the_mean_over_lines_not_over_layouts() -> None:
    found = estimate(grouped({"a": [1, 1, 1], "b": [0]}), seed=0)
    assert found is not None
    assert found.value == 0.75
    assert found.count == 4
    assert found.low <= 0.75 <= found.high


def test_no_lines_have_no_estimate() -> None:
    assert estimate(grouped({}), seed=0) is None
    assert paired_difference(grouped({}), grouped({}), seed=0) is None


def test_the_interval_is_the_same_for_the_same_seed_and_any_order() -> None:
    values = {f"layout {i}": [float(i % 3 > 0)] * (1 + i % 2) for i in range(40)}
    turned = dict(reversed(values.items()))
    assert estimate(grouped(values), seed=1) == estimate(grouped(turned), seed=1)
    assert estimate(grouped(values), seed=1) != estimate(grouped(values), seed=2)


def test_the_interval_holds_the_true_accuracy_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(40):
        scores = (rng.random(150) < 0.8).astype(float)
        found = estimate(grouped({str(i): [score] for i, score in enumerate(scores)}), seed=trial)
        assert found is not None
        held += found.low <= 0.8 <= found.high
    assert held >= 35


def test_lines_that_fail_together_widen_the_interval() -> None:
    random_ = random.Random(0)
    outcomes = [float(random_.random() < 0.5) for _ in range(100)]
    together = estimate(grouped({str(i): [value] * 4 for i, value in enumerate(outcomes)}), seed=0)
    alone = estimate(grouped({f"{i} {j}": [value] for i, value in enumerate(outcomes) for j in range(4)}), seed=0)
    assert together is not None and alone is not None
    assert together.value == alone.value
    assert together.high - together.low > 1.6 * (alone.high - alone.low)


def test_pairing_finds_a_small_difference_that_the_two_intervals_hide() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(400) < 0.5
    a = {str(i): [float(value)] for i, value in enumerate(hard)}
    b = {name: [0.0] if i < 40 else value for i, (name, value) in enumerate(a.items())}
    whole_a, whole_b = estimate(grouped(a), seed=0), estimate(grouped(b), seed=0)
    difference = paired_difference(grouped(a), grouped(b), seed=0)
    assert whole_a is not None and whole_b is not None and difference is not None
    assert whole_b.high > whole_a.low  # the intervals overlap
    assert difference.low > 0
    assert difference.value == pytest.approx(whole_a.value - whole_b.value)


def test_the_root_of_a_mean_square_is_taken_after_the_mean_also_in_a_difference() -> None:
    a = Grouped.of(["x", "y", "y"], [1.0, 4.0, 4.0], root=True)
    b = Grouped.of(["x", "y", "y"], [1.0, 0.0, 0.0], root=True)
    found, difference = estimate(a, seed=0), paired_difference(a, b, seed=0)
    assert found is not None and difference is not None
    assert found.value == pytest.approx(math.sqrt(3)) and found.count == 3
    assert (found.low, found.high) == (1, 2)  # only the one layout, only the other
    assert difference.value == pytest.approx(math.sqrt(3) - math.sqrt(1 / 3))
    assert (difference.low, difference.high) == (0, 2)


def test_runs_on_different_layouts_are_not_compared() -> None:
    with pytest.raises(DataError, match="only in one of them: a"):
        paired_difference(grouped({"a": [1]}), grouped({"b": [1]}), seed=0)
    with pytest.raises(DataError, match="different lines"):
        paired_difference(grouped({"a": [1]}), grouped({"a": [1, 0]}), seed=0)
