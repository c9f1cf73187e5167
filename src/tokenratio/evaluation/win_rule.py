"""What a judge's two verdicts on a pair of responses, one for each order, amount to.

A win needs both orders, as in MT-Bench: a judge that always takes the first response ties.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

Probability = ArrayLike | None

Values = Float[np.ndarray, "*comparisons"]


def preference(prob: Probability) -> Values:
    """Probability less 1/2, such that that of 1 − p is the negative of p's in floating point."""
    return 0.5 - (1.0 - np.asarray(np.nan if prob is None else prob, dtype=np.float64))


def outcomes(prob_a_first: Probability, prob_a_second: Probability) -> Values:
    """1 where response A is preferred in both orders, 0 where B is, else 1/2.

    Args:
        prob_a_first, prob_a_second: the probability that A is better, A shown first or second; nan
            or None where there is no verdict.
    Returns:
        nan where either verdict is missing.
    """
    orders = np.sign(preference(prob_a_first)) + np.sign(preference(prob_a_second))
    return np.where(np.isnan(orders), np.nan, np.trunc(orders / 2) / 2 + 0.5)


def flips(prob_a_first: Probability, prob_a_second: Probability) -> Values:
    """1 where the preference follows the position: one order prefers A, the other B; else 0.

    An even verdict prefers neither. nan where either verdict is missing.
    """
    product = np.sign(preference(prob_a_first)) * np.sign(preference(prob_a_second))
    return np.where(np.isnan(product), np.nan, product < 0)
