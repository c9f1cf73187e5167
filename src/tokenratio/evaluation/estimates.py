"""Means and shares with their uncertainty."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error (prompts are the independent draws), and the number of values.

    The standard error is nan for one prompt.
    """

    mean: float
    standard_error: float
    num: int


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of values, each in a cluster; clusters are independent, values in a cluster perhaps not.

    The standard error is that of the ratio of the clusters' sums to their sizes, cluster-robust:
    with clusters of one value, the usual sd / √n. nan for a single cluster.

    >>> clustered_mean([1.0, 2.0, 3.0], ["a", "b", "c"])
    Estimate(mean=2.0, standard_error=0.5773502691896257, num=3)
    """
    if not values:
        return Estimate(math.nan, math.nan, 0)
    num, mean = len(values), math.fsum(values) / len(values)
    deviations: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        deviations.setdefault(cluster, []).append(value - mean)
    groups = len(deviations)
    if groups < 2:
        return Estimate(mean, math.nan, num)
    squares = math.fsum(math.fsum(group) ** 2 for group in deviations.values())
    return Estimate(mean, math.sqrt(squares * groups / (groups - 1) / num**2), num)


def wilson_interval(share: float, num: float) -> tuple[float, float]:
    """Wilson's 95 % interval for a share of independent draws; within [0, 1] and never empty.

    Args:
        share: observed, in [0, 1]; a tie may count half.
        num: draws, at least 1.

    >>> low, high = wilson_interval(38 / 60, 60)
    >>> round(low, 3), round(high, 3)
    (0.507, 0.744)
    """
    z = NormalDist().inv_cdf(0.975)
    scale = 1 + z**2 / num
    center = (share + z**2 / (2 * num)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    # at 0 and 1 the ends are exact, but for rounding
    return (max(0.0, center - reach) if share > 0 else 0.0), (
        min(1.0, center + reach) if share < 1 else 1.0
    )


def mean_interval(
    mean: float, standard_error: float, num_clusters: int, *, is_share: bool
) -> tuple[float, float]:
    """The 95 % interval of a mean: Wilson's of a share, Student's t of anything else.

    Wilson's takes as many draws as the standard error tells of; the clusters if it is 0, as where
    all agree. (nan, nan) without a standard error.

    Args:
        num_clusters: independent draws, such as prompts.

    >>> [round(end, 2) for end in mean_interval(1.0, 0.0, 82, is_share=True)]
    [0.96, 1.0]
    >>> [round(end, 2) for end in mean_interval(3.0, 0.5, 5, is_share=False)]
    [1.61, 4.39]
    """
    if math.isnan(mean) or math.isnan(standard_error) or num_clusters < 2:
        return math.nan, math.nan
    if not is_share or not 0 <= mean <= 1:
        from scipy import stats  # late: every command reads this module, few need scipy

        error = float(stats.t.ppf(0.975, num_clusters - 1)) * standard_error
        return mean - error, mean + error
    variance = mean * (1 - mean)
    draws = variance / standard_error**2 if variance > 0 and standard_error > 0 else num_clusters
    return wilson_interval(mean, draws)
