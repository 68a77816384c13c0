"""How well text came out: Sen. Acc and NED, with bootstrap intervals, alone and as paired differences.

The unit that is resampled is the layout, with all its lines and samples: lines of one image fail together, so that
resampling lines would give intervals that are too narrow.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.seeding import derive_seed

RESAMPLES = 2000
"""Bootstrap resamples behind every interval."""
CONFIDENCE = 0.95
"""Coverage of every interval."""

Floats = NDArray[np.float64]


def levenshtein(a: str, b: str) -> int:
    """Return the fewest insertions, deletions and substitutions of a character that turn a into b."""
    previous = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        current = [i]
        for j, right in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (left != right)))
        previous = current
    return previous[-1]


def ned(text: str, read: str) -> float:
    """Return the normalised edit similarity, 1 for equal texts (less 1e-5) and 0 for wholly different ones.

    Source: AnyText-benchmark: 1 - levenshtein / (length of the longer + 1e-5).
    """
    text, read = composed(text), composed(read)
    return 1 - levenshtein(text, read) / (max(len(text), len(read)) + 1e-5)


def composed(text: str) -> str:
    """Return a text in Unicode's composed form (NFC): two texts that look the same for sure are then equal."""
    return unicodedata.normalize("NFC", text)


def fold(text: str) -> str:
    """Drop case, width and spaces: these a judge guesses, what is left are the letters.

    Of Unicode's compatible characters only those of another width fold: ² is no 2 to who reads it.
    """
    narrow = "".join(map(_usual_width, text))
    return composed("".join(composed(narrow).split()).casefold())


def _usual_width(character: str) -> str:
    kind, _, code = unicodedata.decomposition(character).partition(" ")
    return chr(int(code, 16)) if kind in ("<wide>", "<narrow>") else character


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean, or the root of a mean square, with its bootstrap interval."""

    value: float
    """Over all lines, or images."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""
    count: int
    """Lines, or images, in the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped:
    """Scores of lines, summed over each layout: all that a mean and its bootstrap need."""

    layout_ids: tuple[str, ...]
    """Sorted."""
    sums: Floats
    """(layouts,) sum of the layout's line scores."""
    counts: Floats
    """(layouts,) number of its lines."""
    root: bool = False
    """Whether the scores are mean squares, of whose mean the root is meant."""

    @classmethod
    def of(cls, layout_ids: Sequence[str], scores: Sequence[float], *, root: bool = False) -> Grouped:
        """Group line scores, or those of images, in any order, by the layout that each belongs to."""
        names, inverse = np.unique(np.asarray(layout_ids, dtype=str), return_inverse=True)
        values = np.asarray(scores, np.float64)
        return cls(
            layout_ids=tuple(names.tolist()),
            sums=np.bincount(inverse, weights=values, minlength=len(names)).astype(np.float64),
            counts=np.bincount(inverse, minlength=len(names)).astype(np.float64),
            root=root,
        )

    def means(self, weights: Floats) -> Floats:
        """Return the mean score, or the root of it, where layouts count as often as `weights`, (..., layouts)."""
        means: Floats = (weights @ self.sums) / (weights @ self.counts)
        return np.sqrt(means) if self.root else means


def estimate(grouped: Grouped, seed: int) -> Estimate | None:
    """Return the mean line score with its percentile interval; None if there are no lines.

    Source: Efron & Tibshirani 1993, chapter 13 (percentile interval), on whole layouts.
    """
    if not grouped.counts.sum():
        return None
    low, high = percentile_interval(grouped.means(resample(len(grouped.layout_ids), seed)))
    once = np.ones(len(grouped.layout_ids))
    return Estimate(value=float(grouped.means(once)), low=low, high=high, count=int(grouped.counts.sum()))


def paired_difference(a: Grouped, b: Grouped, seed: int) -> Estimate | None:
    """Return mean(a) - mean(b), both resampled by the same layouts; None if there are no lines.

    Raises:
        DataError: the two were not measured on the same layouts and lines.
    """
    if a.layout_ids != b.layout_ids or not np.array_equal(a.counts, b.counts):
        only = sorted(set(a.layout_ids) ^ set(b.layout_ids))
        where = f"only in one of them: {only[0]}" if only else "the same layouts with different lines"
        raise DataError(
            f"paired difference: received runs on {len(a.layout_ids)} and {len(b.layout_ids)} layouts ({where}),"
            " expected the same layouts and samples; evaluate both in one folder"
        )
    if not a.counts.sum():
        return None
    weights = resample(len(a.layout_ids), seed)
    low, high = percentile_interval(_differences(a, b, weights))
    value = float(_differences(a, b, np.ones(len(a.layout_ids))))
    return Estimate(value=value, low=low, high=high, count=int(a.counts.sum()))


def _differences(a: Grouped, b: Grouped, weights: Floats) -> Floats:
    if a.root:
        return a.means(weights) - b.means(weights)
    # One sum: where the two agree, it is 0 and not the rounding of two means.
    differences: Floats = (weights @ (a.sums - b.sums)) / (weights @ a.counts)
    return differences


@lru_cache(maxsize=4)  # the same for all runs and scores of a table
def resample(size: int, seed: int) -> Floats:
    """Return how often each layout is drawn in each resample, (RESAMPLES, size)."""
    rng = np.random.Generator(np.random.Philox(derive_seed("bootstrap", seed)))
    return rng.multinomial(size, np.full(size, 1 / size), size=RESAMPLES).astype(np.float64)


def percentile_interval(values: Floats) -> tuple[float, float]:
    """Return the ends of the interval that `CONFIDENCE` of resampled values lie in."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
