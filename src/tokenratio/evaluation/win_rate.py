"""How often a judge prefers one policy's responses to another's, each pair asked in both orders.

A win needs both orders, as in MT-Bench: a judge that always takes the first response ties.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.estimates import clustered_mean
from tokenratio.evaluation.resampling import LEVEL, cluster_codes, draws

Probability = ArrayLike | None
Values = Float[np.ndarray, "*comparisons"]


@dataclass(frozen=True)
class WinRate:
    """Policy A against policy B; shares lie in [0, 1].

    Attributes:
        win: A is preferred in both orders.
        tie: neither is: the orders contradict each other, or a verdict is even.
        lose: B is preferred in both orders.
        win_rate: wins and half the ties.
        standard_error: of the win rate, clustered by prompt; nan for one prompt.
        interval: 95 %, of the win rate.
        mean_probability: the judge's mean probability that A is better.
        flip_rate: comparisons in which the preference follows the position; see `flips`.
        num_comparisons: with both verdicts; the figures above are over these.
        num_prompts: among them.
        num_incomplete: comparisons without a verdict in one order or both; not counted.
    """

    win: float
    tie: float
    lose: float
    win_rate: float
    standard_error: float
    interval: tuple[float, float]
    mean_probability: float
    flip_rate: float
    num_comparisons: int
    num_prompts: int
    num_incomplete: int


def outcomes(prob_a_first: Probability, prob_a_second: Probability) -> Values:
    """1 where response A is preferred in both orders, 0 where B is, else 1/2.

    Args:
        prob_a_first, prob_a_second: the probability that A is better, A shown first or second; nan
            or None without a verdict.
    Returns:
        nan where either verdict is missing.
    """
    orders = np.sign(_preference(prob_a_first)) + np.sign(_preference(prob_a_second))
    return np.where(np.isnan(orders), np.nan, np.trunc(orders / 2) / 2 + 0.5)


def flips(prob_a_first: Probability, prob_a_second: Probability) -> Values:
    """1 where the preference follows the position: one order prefers A, the other B; else 0.

    An even verdict prefers neither. nan where either verdict is missing.
    """
    product = np.sign(_preference(prob_a_first)) * np.sign(_preference(prob_a_second))
    return np.where(np.isnan(product), np.nan, product < 0)


def _preference(prob: Probability) -> Values:
    """Probability less 1/2, computed so that p and 1 − p give exact negatives."""
    return 0.5 - (1.0 - np.asarray(np.nan if prob is None else prob, dtype=np.float64))


def win_rate(
    prob_a_first: ArrayLike,
    prob_a_second: ArrayLike,
    prompts: Sequence[Hashable] | None = None,
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> WinRate:
    """Count a judge's verdicts by the rule of `outcomes`.

    Swapping the policies swaps win and lose exactly. The interval is a percentile bootstrap over
    prompts; if all comparisons have the same outcome, resamples do not vary, and it is the exact
    binomial interval for that many prompts.

    Args:
        prob_a_first: for each comparison, the judge's probability that A's response is better,
            A's shown first; 0, 1 or 1/2 from a judge that only names a winner; nan without a
            verdict.
        prob_a_second: the same, A's response shown second.
        prompts: of each comparison; a prompt's comparisons count as one draw. All differ if None.
        seed: fixes the interval.
    Raises:
        TokenRatioError: a value is not a probability, or no comparison has both verdicts.
    """
    if num_resamples < 1:
        raise TokenRatioError(f"num_resamples must be at least 1, not {num_resamples}.")
    first = probabilities("prob_a_first", prob_a_first)
    second = probabilities("prob_a_second", prob_a_second)
    names = list(range(len(first))) if prompts is None else list(prompts)
    if not len(first) == len(second) == len(names):
        raise TokenRatioError(
            f"{len(first)} verdicts with A first, {len(second)} with A second, {len(names)} "
            "prompts: there must be one of each for a comparison."
        )
    complete = ~np.isnan(first + second)
    if not complete.any():
        raise TokenRatioError(
            f"none of {len(first)} comparisons has a verdict in both orders; look at what the "
            "judge replied."
        )
    first, second = first[complete], second[complete]
    kept = [name for name, keep in zip(names, complete, strict=True) if keep]
    codes = cluster_codes(kept)
    # ±1/2 and 0: centered on zero, B's figures are A's with the other sign, to the last bit.
    centered = outcomes(first, second) - 0.5
    sizes = np.bincount(codes)
    estimate = clustered_mean(centered.tolist(), kept)
    wins, losses = int((centered > 0).sum()), int((centered < 0).sum())
    # The sum of each pair first, so that the order of its verdicts does not matter.
    num, preferred = len(centered), _preference(first) + _preference(second)
    return WinRate(
        win=wins / num,
        tie=(num - wins - losses) / num,
        lose=losses / num,
        win_rate=_share(estimate.mean),
        standard_error=estimate.standard_error,
        interval=_interval(centered, codes, sizes, num_resamples, seed),
        mean_probability=_share(float(preferred.sum()) / (2 * num)),
        flip_rate=float(flips(first, second).mean()),
        num_comparisons=num,
        num_prompts=len(sizes),
        num_incomplete=int((~complete).sum()),
    )


def probabilities(name: str, values: ArrayLike) -> Float[np.ndarray, "comparisons"]:
    """As an array, nan allowed; `TokenRatioError` for other values outside [0, 1]."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise TokenRatioError(
            f"{name} has shape {array.shape}; it must hold one number per comparison."
        )
    wrong = np.flatnonzero((array < 0) | (array > 1))
    if wrong.size:
        raise TokenRatioError(
            f"{name}: row {wrong[0]} is {array[wrong[0]]}, not a probability between 0 and 1 "
            f"(and {wrong.size - 1} further rows)."
        )
    return array


def _share(preference: float) -> float:
    """1/2 + preference, rounded so that the shares of ±preference sum to exactly 1."""
    larger = 0.5 + abs(preference)
    return larger if preference >= 0 else 1.0 - larger


def _interval(
    centered: Float[np.ndarray, "comparisons"],
    codes: Int[np.ndarray, "comparisons"],
    sizes: Int[np.ndarray, "prompts"],
    num_resamples: int,
    seed: int,
) -> tuple[float, float]:
    if np.all(centered == centered[0]) and centered[0] != 0:
        # Clopper and Pearson's; its other end is the win rate itself.
        reach = (LEVEL / 2) ** (1 / len(sizes)) - 0.5
        return (_share(reach), 1.0) if centered[0] > 0 else (0.0, _share(-reach))
    sums = np.bincount(codes, weights=centered)
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [sums[rows].sum(1) / sizes[rows].sum(1) for rows in draws(rng, len(sizes), num_resamples)]
    )
    means.sort()
    # As many resamples below as above: interpolated quantiles would not mirror exactly.
    tail = int(num_resamples * LEVEL / 2)
    return _share(float(means[tail])), _share(float(means[-1 - tail]))
