"""Bootstraps over clusters and random signs, a few resamples at a time."""

import math
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

LEVEL = 0.05  # of tests; intervals hold 1 − LEVEL
_CHUNK = 1 << 20  # numbers drawn at a time, which bounds the memory


def cluster_codes(clusters: Sequence[Hashable]) -> Int[np.ndarray, "rows"]:
    """Each row's cluster as a number from 0, in the order of first appearance."""
    codes = {cluster: code for code, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([codes[cluster] for cluster in clusters], dtype=np.int64)


def draws(
    rng: np.random.Generator, num_clusters: int, num_resamples: int
) -> Iterator[Int[np.ndarray, "resamples clusters"]]:
    """Indices of clusters drawn with replacement: a row for each resample, in chunks of rows."""
    for num in _chunks(num_clusters, num_resamples):
        yield rng.integers(0, num_clusters, (num, num_clusters))


def _chunks(num_clusters: int, num_resamples: int) -> Iterator[int]:
    rows = max(1, _CHUNK // num_clusters)
    for begin in range(0, num_resamples, rows):
        yield min(rows, num_resamples - begin)


def resampled_means(
    deviations: Float[np.ndarray, "clusters"], rng: np.random.Generator, num_resamples: int
) -> Float[np.ndarray, "resamples"]:
    """Means of clusters drawn with replacement, spread like a t with clusters − 1 degrees."""
    num = len(deviations)
    means = np.concatenate([deviations[rows].mean(1) for rows in draws(rng, num, num_resamples)])
    # A resample's variance is (n − 1) / n of the unbiased one, so that n − 1 cancels.
    return means * math.sqrt(num) / np.sqrt(rng.chisquare(num - 1, num_resamples))


def flipped_means(
    values: Float[np.ndarray, "clusters"], rng: np.random.Generator, num_resamples: int
) -> Float[np.ndarray, "resamples"]:
    """Means of the values with random signs."""
    signs = (
        rng.integers(0, 2, (num, len(values)), dtype=np.int8) * np.int8(2) - np.int8(1)
        for num in _chunks(len(values), num_resamples)
    )
    return np.concatenate([(each * values).mean(1) for each in signs])
