"""A mean and how well it is known."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


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
