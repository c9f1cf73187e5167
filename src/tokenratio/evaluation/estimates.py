"""A mean and how well it is known."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Estimate:
    """A mean over responses.

    Attributes:
        mean: over all responses.
        standard_error: of the mean, prompts taken as the independent draws; nan for one prompt.
        num: responses.
    """

    mean: float
    standard_error: float
    num: int


def clustered_mean(values: Sequence[float], sizes: Sequence[int]) -> Estimate:
    """Mean of values that come in groups, the groups independent, values of one group perhaps not.

    The standard error is that of the ratio of the groups' sums to their sizes, cluster-robust: with
    groups of one value, the usual sd / √n.

    >>> clustered_mean([1.0, 2.0, 3.0], [1, 1, 1])
    Estimate(mean=2.0, standard_error=0.5773502691896257, num=3)
    """
    num, groups = len(values), [size for size in sizes if size]
    mean = math.fsum(values) / num
    squares, begin = [], 0
    for size in groups:
        squares.append(math.fsum(value - mean for value in values[begin : begin + size]) ** 2)
        begin += size
    if len(groups) < 2:
        return Estimate(mean, math.nan, num)
    variance = math.fsum(squares) * len(groups) / (len(groups) - 1) / num**2
    return Estimate(mean, math.sqrt(variance), num)


def wilson_interval(share: float, num: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share of independent draws; within [0, 1] and never empty.

    Args:
        share: observed, in [0, 1]; a tie may count half.
        num: draws, at least 1.

    >>> low, high = wilson_interval(38 / 60, 60)
    >>> round(low, 3), round(high, 3)
    (0.507, 0.744)
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    scale = 1 + z**2 / num
    center = (share + z**2 / (2 * num)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    # at 0 and 1 the ends are exact, but for rounding
    return (max(0.0, center - reach) if share > 0 else 0.0), (
        min(1.0, center + reach) if share < 1 else 1.0
    )
