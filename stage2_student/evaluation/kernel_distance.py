"""KID: how far apart two sets of images are as distributions, by an unbiased kernel distance of their features.

Text, colour and ground are compared image by image; where a caption leaves much to chance, two good images of one
caption differ, and only the sets can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.seeding import derive_seed
from stage2_student.evaluation.metrics import Estimate, Floats, percentile_interval, resample

SPLITS = 500
"""Random halves of the true images behind the interval of `halves_distance`."""
LEAST_LAYOUTS = 4
"""Fewer have no two halves of two."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageFeatures:
    """Features of a run's images, by layout."""

    layout_ids: tuple[str, ...]
    """Sorted, distinct; n of them."""
    values: NDArray[np.float32]
    """(n, S, F), of S samples each."""


def kernel_distance(truth: ImageFeatures, other: ImageFeatures, seed: int) -> Estimate:
    """Return KID of a run's images to the true images of the same layouts, with its bootstrap interval.

    Args:
        truth: one sample each is taken.
        other: of the same layouts, at least two.
        seed: keys the resampling.

    Raises:
        ValueError: the layouts are not the same.
    """
    return _estimate(*resampled_distance(truth, other, seed), len(truth.layout_ids))


def resampled_distance(truth: ImageFeatures, other: ImageFeatures, seed: int) -> tuple[float, Floats]:
    """Return KID of a run's images to the true images of the same layouts, and its bootstrap resamples.

    The mean over pairs of different layouts i, j of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i), for
    true images x and drawn ones y, with the cubic kernel k of KID. Image and true image of one layout are not
    compared: they share text and caption. The resamples draw layouts, the same ones for every run: differences of
    two runs' resamples are paired.

    Args:
        truth: one sample each is taken.
        other: of the same layouts, at least two.
        seed: keys the resampling.

    Returns:
        The distance, and that of each resample, (RESAMPLES,).

    Raises:
        ValueError: the layouts are not the same.

    Source: Binkowski et al. 2018, arXiv 1801.01401; Gretton et al. 2012, JMLR 13, lemma 6 (the paired statistic).
    """
    if truth.layout_ids != other.layout_ids:
        raise ValueError(
            f"received {len(other.layout_ids)} layouts, expected the {len(truth.layout_ids)} true ones"
        )
    x, scale = _standardise(truth)
    ys = [scale(other.values[:, sample]) for sample in range(other.values.shape[1])]
    across = sum(_kernel(x, y) for y in ys) / len(ys)  # (n, n)
    within = sum(_kernel(y, z) for y in ys for z in ys) / len(ys) ** 2
    pairs = np.asarray(_kernel(x, x) + within - across - np.transpose(across), np.float64)
    np.fill_diagonal(pairs, 0)
    count = len(x)
    weights = resample(count, seed)  # (R, n): how often each layout is drawn
    sums = ((weights @ pairs) * weights).sum(axis=1)
    # A layout that is drawn twice is no pair of different ones.
    drawn = np.maximum(count**2 - np.square(weights).sum(axis=1), 1)
    return float(pairs.sum() / (count * (count - 1))), np.asarray(sums / drawn, np.float64)


def halves_distance(truth: ImageFeatures, seed: int) -> Estimate | None:
    """Return KID between two halves of the true images: what chance alone makes of as many images.

    Args:
        truth: one sample each is taken.
        seed: keys the halves.

    Returns:
        The median of `SPLITS` random splits and the interval that 95 % of them lie in; None of fewer than four
        layouts. Half as many images vary more than all: the interval is rather too wide than too narrow.
    """
    count = len(truth.layout_ids)
    if count < LEAST_LAYOUTS:
        return None
    x, _ = _standardise(truth)
    kernel = np.asarray(_kernel(x, x), np.float64)
    np.fill_diagonal(kernel, 0)  # in two halves no image meets itself
    rng = np.random.Generator(np.random.Philox(derive_seed("halves", seed)))
    order = rng.permuted(np.tile(np.arange(count), (SPLITS, 1)), axis=1)  # (splits, n)
    first = (order < count // 2).astype(np.float64)
    second = 1 - first
    sizes = count // 2, count - count // 2

    def total(a: Floats, b: Floats) -> Floats:
        return np.asarray(((a @ kernel) * b).sum(axis=1), np.float64)

    within = sum(total(a, a) / (n * (n - 1)) for a, n in zip((first, second), sizes, strict=True))
    values = within - 2 * total(first, second) / (sizes[0] * sizes[1])
    return _estimate(float(np.median(values)), values, count)


def _standardise(truth: ImageFeatures) -> tuple[Floats, _Scale]:
    """Return the true images' features (n, F') with mean 0 and variance 1, and what does the same to others'."""
    values = truth.values[:, 0].astype(np.float64)
    scale = _Scale(mean=values.mean(axis=0), deviation=values.std(axis=0))
    return scale(values), scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Scale:
    mean: Floats
    """(F,), as the next."""
    deviation: Floats

    def __call__(self, values: NDArray[np.floating]) -> Floats:
        """Standardise features (n, F); those that are the same in all true images are left out."""
        told = self.deviation > 1e-6 * (1 + np.abs(self.mean))
        return np.asarray((values - self.mean)[:, told] / self.deviation[told], np.float64)


def _kernel(a: Floats, b: Floats) -> Floats:
    """KID's kernel of features (n, F) and (m, F), (n, m)."""
    return np.asarray((a @ b.T / max(a.shape[1], 1) + 1) ** 3, np.float64)


def _estimate(value: float, resampled: Floats, count: int) -> Estimate:
    low, high = percentile_interval(resampled)
    return Estimate(value=value, low=low, high=high, count=count)
