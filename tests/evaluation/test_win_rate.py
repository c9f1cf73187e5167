import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.win_rate import flips, outcomes, win_rate

VERDICTS = st.one_of(st.sampled_from([0.0, 0.5, 1.0, math.nan]), st.floats(0, 1))
COMPARISONS = st.lists(st.tuples(VERDICTS, VERDICTS, st.integers(0, 5)), min_size=1, max_size=30)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(COMPARISONS)
def test_swapping_policies_mirrors_to_the_last_bit(rows):
    first, second, prompts = (list(column) for column in zip(*rows, strict=True))
    if all(math.isnan(a + b) for a, b, _ in rows):
        with pytest.raises(TokenRatioError, match="has a verdict in both orders"):
            win_rate(first, second, prompts)
        return
    ours = win_rate(first, second, prompts, num_resamples=200)
    # For policy B, A's second place is the first.
    swapped = 1.0 - np.asarray(second), 1.0 - np.asarray(first)
    theirs = win_rate(*swapped, prompts, num_resamples=200)
    assert (ours.win, ours.tie, ours.lose) == (theirs.lose, theirs.tie, theirs.win)
    assert ours.win_rate + theirs.win_rate == 1.0
    assert ours.mean_probability + theirs.mean_probability == 1.0
    assert ours.interval == (1 - theirs.interval[1], 1 - theirs.interval[0])
    same = {"flip_rate", "num_comparisons", "num_prompts", "num_incomplete"}
    assert all(getattr(ours, name) == getattr(theirs, name) for name in same)
    assert ours.standard_error == theirs.standard_error or math.isnan(ours.standard_error)
    assert {field.name for field in fields(ours)} > same


def test_by_hand():
    first = [1.0, 0.9, 1.0, 0.0, 0.5, 0.2, math.nan, 0.6]
    second = [1.0, 0.6, 0.0, 1.0, 1.0, 0.1, 0.7, math.nan]
    # win, win, flip (always the first), flip (always the second), tie and win, lose; two incomplete
    found = win_rate(first, second)
    assert (found.win, found.tie, found.lose) == (2 / 6, 3 / 6, 1 / 6)
    assert found.win_rate == pytest.approx(3.5 / 6)
    assert found.flip_rate == 2 / 6
    assert found.mean_probability == pytest.approx(np.mean([1, 0.75, 0.5, 0.5, 0.75, 0.15]))
    assert (found.num_comparisons, found.num_prompts, found.num_incomplete) == (6, 6, 2)
    # One comparison a prompt: the usual standard error.
    scores = [1, 1, 0.5, 0.5, 0.5, 0]
    assert found.standard_error == pytest.approx(stats.sem(scores))


def test_a_judge_of_positions_ties():
    found = win_rate(np.ones(50), np.zeros(50))
    assert (found.win_rate, found.tie, found.flip_rate, found.standard_error) == (0.5, 1, 1, 0)


def test_prompts_are_the_draws():
    rng = np.random.default_rng(0)
    once = (rng.random(40) < 0.7).astype(float)
    prompts = [f"prompt {index}" for index in range(40)]
    alone, repeated = win_rate(once, once, prompts), win_rate(*[np.tile(once, 5)] * 2, prompts * 5)
    assert repeated.standard_error == pytest.approx(alone.standard_error)
    assert repeated.interval == alone.interval
    assert win_rate(np.tile(once, 5), np.tile(once, 5)).standard_error < 0.5 * alone.standard_error
    assert math.isnan(win_rate([1.0, 0.0], [1.0, 0.0], ["p", "p"]).standard_error)


def test_interval_against_scipys_bootstrap():
    rng = np.random.default_rng(1)
    prob = rng.choice([0.0, 0.5, 1.0], p=[0.2, 0.2, 0.6], size=120)
    theirs = stats.bootstrap(
        (prob,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    found = win_rate(prob, prob)
    assert found.interval == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert win_rate(prob, prob) == found
    intervals = {win_rate(prob, prob, num_resamples=100, seed=seed).interval for seed in range(5)}
    assert len(intervals) > 1


def test_intervals_hold_the_truth():
    """60 prompts of two comparisons each, whose win rates differ by prompt; the mean is 0.6."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        chance = np.repeat(rng.beta(3, 2, size=60), 2)
        prob = (rng.random(120) < chance).astype(float)
        low, high = win_rate(prob, prob, np.repeat(np.arange(60), 2), num_resamples=500).interval
        covered += low <= 0.6 <= high
    assert 0.91 < covered / 300 < 0.98


def test_who_always_wins_is_not_certain_to():
    for num in (1, 4, 20, 300):
        found = win_rate(np.ones(num), np.ones(num))
        exact = stats.binomtest(num, num).proportion_ci(0.95).low
        assert found.interval == (pytest.approx(exact), 1.0)
    assert win_rate([0.0] * 20, [0.0] * 20).interval == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))


@pytest.mark.parametrize(
    ("first", "second", "prompts", "message"),
    [
        ([0.5, 1.2, -1.0], [0.5] * 3, None, "prob_a_first: row 1 is 1.2.*1 further"),
        ([0.5], [0.5, 0.5], None, "1 verdicts with A first, 2 with A second"),
        ([0.5], [0.5], ["p", "q"], "2 prompts"),
        ([[0.5]], [0.5], None, "shape"),
        ([math.nan, 1.0], [1.0, math.nan], None, "none of 2 comparisons"),
        ([], [], None, "none of 0 comparisons"),
    ],
)
def test_mistakes_are_named(first, second, prompts, message):
    with pytest.raises(TokenRatioError, match=message):
        win_rate(first, second, prompts)
    with pytest.raises(TokenRatioError, match="num_resamples"):
        win_rate([1.0], [1.0], num_resamples=0)


# The probability that A is better, A shown first and second; who wins, and whether it flipped.
ORDERS = [
    (1.0, 0.7, 1.0, 0.0),
    (0.2, 0.0, 0.0, 0.0),
    (1.0, 0.0, 0.5, 1.0),  # whoever is first
    (0.1, 0.9, 0.5, 1.0),  # whoever is second
    (0.5, 1.0, 0.5, 0.0),  # one order is even
    (0.0, 0.5, 0.5, 0.0),
    (0.5, 0.5, 0.5, 0.0),
]


@pytest.mark.parametrize(("first", "second", "outcome", "flipped"), ORDERS)
def test_a_win_needs_both_orders(first, second, outcome, flipped):
    assert (float(outcomes(first, second)), float(flips(first, second))) == (outcome, flipped)
    # The same for B: where A stood first, B stood second.
    assert float(outcomes(1 - second, 1 - first)) == 1 - outcome
    assert float(flips(1 - second, 1 - first)) == flipped


def test_many_at_once_and_without_a_verdict():
    first, second, won, flipped = zip(*ORDERS, strict=True)
    assert outcomes(first, second).tolist() == list(won)
    assert flips(first, second).tolist() == list(flipped)
    for pair in ((None, 1.0), (0.0, math.nan), (None, None)):
        assert math.isnan(outcomes(*pair))
        assert math.isnan(flips(*pair))
