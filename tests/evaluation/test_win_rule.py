import math

import pytest

from tokenratio.evaluation.win_rule import flips, outcomes

# The probability that A is better, A shown first and second; who wins, and whether it flipped.
CASES = [
    (1.0, 0.7, 1.0, 0.0),
    (0.2, 0.0, 0.0, 0.0),
    (1.0, 0.0, 0.5, 1.0),  # whoever is first
    (0.1, 0.9, 0.5, 1.0),  # whoever is second
    (0.5, 1.0, 0.5, 0.0),  # one order is even
    (0.0, 0.5, 0.5, 0.0),
    (0.5, 0.5, 0.5, 0.0),
]


@pytest.mark.parametrize(("first", "second", "outcome", "flipped"), CASES)
def test_a_win_needs_both_orders(first, second, outcome, flipped):
    assert (float(outcomes(first, second)), float(flips(first, second))) == (outcome, flipped)
    # Told of B: where A stood first, B stood second.
    assert float(outcomes(1 - second, 1 - first)) == 1 - outcome
    assert float(flips(1 - second, 1 - first)) == flipped


def test_many_at_once_and_without_a_verdict():
    first, second, won, flipped = zip(*CASES, strict=True)
    assert outcomes(first, second).tolist() == list(won)
    assert flips(first, second).tolist() == list(flipped)
    for pair in ((None, 1.0), (0.0, math.nan), (None, None)):
        assert math.isnan(outcomes(*pair))
        assert math.isnan(flips(*pair))
