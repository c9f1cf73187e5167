import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from scipy.special import expit

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.length_control import (
    length_controlled_win_rate,
)


def judged(rng, num_prompts, *, samples=1, quality=0.0, length=0.0, prompt_sd=0.0, longer=1.4):
    """Verdicts of a judge that follows the model, on responses of A that are mostly longer."""
    num = num_prompts * samples
    lengths_a, lengths_b = longer * rng.lognormal(5, 0.5, num), rng.lognormal(5, 0.5, num)
    difference = lengths_a - lengths_b
    prompts = np.repeat(np.arange(num_prompts), samples)
    log_odds = quality + length * np.tanh(difference / difference.std(ddof=1))
    chance = expit(log_odds + (prompt_sd * rng.normal(size=num_prompts))[prompts])
    return (rng.random(num) < chance).astype(float), lengths_a, lengths_b, prompts.tolist()


def test_a_judge_that_only_likes_length():
    """50 at equal length, while the raw win rate is far from it."""
    rng = np.random.default_rng(0)
    prob, *rest = judged(rng, 2000, length=3.0, longer=2.0)
    found = length_controlled_win_rate(prob, *rest)
    assert prob.mean() > 0.65
    assert found.win_rate == pytest.approx(0.5, abs=3 * found.standard_error)
    assert found.interval[0] < 0.5 < found.interval[1]
    assert found.standard_error < 0.02
    assert found.length_effect == pytest.approx(3.0, abs=0.5)
    # The longer of the two wins, without exception: no finite fit without a prior.
    certain = (rest[0] > rest[1]).astype(float)
    found = length_controlled_win_rate(certain, *rest)
    assert found.win_rate == pytest.approx(0.5, abs=3 * found.standard_error)


def test_a_judge_that_does_not_see_length():
    rng = np.random.default_rng(1)
    for quality in (-1.0, 0.0, 0.8):
        prob, *rest = judged(rng, 1000, quality=quality)
        found = length_controlled_win_rate(prob, *rest)
        assert found.win_rate == pytest.approx(prob.mean(), abs=1.5 * found.standard_error)
        assert abs(found.length_effect) < 0.5


@pytest.mark.parametrize("samples", [1, 4])
def test_equal_lengths_leave_the_raw_win_rate(samples):
    """Up to the prior's half win and half loss, with and without prompt effects."""
    rng = np.random.default_rng(2)
    prob, _, _, prompts = judged(rng, 150, samples=samples, quality=0.5, prompt_sd=2.0)
    lengths = rng.integers(1, 100, len(prob))
    found = length_controlled_win_rate(prob, lengths, lengths, prompts)
    assert found.win_rate == pytest.approx(prob.mean(), abs=0.5 / len(prob))
    spread = stats.sem(prob.reshape(150, samples).mean(1))
    assert found.standard_error == pytest.approx(spread, rel=0.02)
    assert found.length_effect == 0.0
    assert (found.prompt_sd > 1) == (samples == 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_prompts", "samples", "prompt_sd"), [(60, 1, 0.0), (200, 1, 1.0), (60, 3, 1.5)]
)
def test_intervals_hold_the_truth(num_prompts, samples, prompt_sd):
    rng = np.random.default_rng(samples)
    effects = prompt_sd * np.random.default_rng(0).normal(size=200_000)
    truth, covered, errors, values = expit(0.5 + effects).mean(), 0, [], []
    for _ in range(200):
        rows = judged(
            rng, num_prompts, samples=samples, quality=0.5, length=1.0, prompt_sd=prompt_sd
        )
        found = length_controlled_win_rate(*rows)
        covered += found.interval[0] <= truth <= found.interval[1]
        errors.append(found.standard_error)
        values.append(found.win_rate)
    assert 0.90 < covered / 200 < 0.99
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)
    assert np.mean(values) == pytest.approx(truth, abs=0.015)


@pytest.mark.slow
def test_standard_error_against_a_bootstrap():
    """Prompts redrawn, everything refitted."""
    rng = np.random.default_rng(3)
    prob, lengths_a, lengths_b, prompts = judged(
        rng, 80, samples=3, quality=0.4, length=1.5, prompt_sd=1.0
    )
    values = []
    for _ in range(200):
        drawn = rng.integers(0, 80, 80)
        rows = (drawn[:, None] * 3 + np.arange(3)).ravel()
        names = np.repeat(np.arange(80), 3).tolist()
        resample = (prob[rows], lengths_a[rows], lengths_b[rows], names)
        values.append(length_controlled_win_rate(*resample).win_rate)
    found = length_controlled_win_rate(prob, lengths_a, lengths_b, prompts)
    assert found.standard_error == pytest.approx(np.std(values), rel=0.15)


# scikit-learn 1.8.0 warns although no penalty is set.
@pytest.mark.filterwarnings("ignore:Setting penalty=None")
def test_coefficients_against_scikit_learn():
    """Soft labels, each prompt once; scikit-learn has no prior here, and gets ours as rows."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(4)
    _, lengths_a, lengths_b, _ = judged(rng, 120)
    prob = rng.beta(1, 0.7, size=120)
    difference = lengths_a - lengths_b
    length = np.tanh(difference / difference.std(ddof=1))
    features = np.vstack([np.column_stack([np.ones(120), length]), np.eye(2)])
    wins = np.append(prob, [0.5, 0.5])
    theirs = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(
        np.tile(features, (2, 1)),
        np.repeat([1, 0], 122),
        sample_weight=np.concatenate([wins, 1 - wins]),
    )
    found = length_controlled_win_rate(prob, lengths_a, lengths_b)
    assert (found.quality, found.length_effect) == pytest.approx(theirs.coef_[0], abs=1e-5)
    assert found.win_rate == pytest.approx(expit(theirs.coef_[0][0]), abs=1e-6)


@pytest.mark.slow
def test_prompt_effects_against_adaptive_integration():
    """The same model, u_x integrated out by scipy's quadrature and fitted without gradients."""
    rng = np.random.default_rng(5)
    prob, lengths_a, lengths_b, prompts = judged(
        rng, 8, samples=4, quality=0.5, length=1.0, prompt_sd=3.0
    )
    difference = (lengths_a - lengths_b).reshape(8, 4)
    length = np.tanh(difference / difference.std(ddof=1))
    wins = prob.reshape(8, 4)

    def integral(params, row, factor=lambda u: 1.0):
        quality, effect, sd = params

        def density(u):
            chance = expit(quality + effect * length[row] + u)
            likelihood = np.prod(np.where(wins[row] == 1, chance, 1 - chance))
            return factor(u) * likelihood * stats.norm.pdf(u, scale=sd)

        return integrate.quad(density, -6 * sd, 6 * sd, epsabs=1e-12)[0]

    def loss(params):
        prior = sum(b / 2 - np.logaddexp(0, b) for b in params[:2]) - params[2] ** 2 / 12.5
        return -prior - sum(math.log(integral(params, row)) for row in range(8))

    found = length_controlled_win_rate(prob, lengths_a, lengths_b, prompts)
    ours = (found.quality, found.length_effect, found.prompt_sd)
    theirs = optimize.minimize(
        loss, np.round(ours, 1), method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-6}
    ).x
    assert found.prompt_sd > 0.5
    assert ours == pytest.approx(theirs, abs=5e-3)
    win = [
        integral(ours, row, lambda u: expit(ours[0] + u)) / integral(ours, row) for row in range(8)
    ]
    assert found.win_rate == pytest.approx(np.mean(win), abs=1e-5)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(1, 200), st.integers(1, 200), st.integers(0, 9)),
        min_size=5,
        max_size=40,
    ).filter(lambda rows: len({a - b for _, a, b, _ in rows}) > 1)
)
def test_swapping_policies_mirrors(rows):
    prob, lengths_a, lengths_b, prompts = zip(*rows, strict=True)
    ours = length_controlled_win_rate(prob, lengths_a, lengths_b, prompts)
    theirs = length_controlled_win_rate(1 - np.array(prob), lengths_b, lengths_a, prompts)
    assert ours.win_rate == pytest.approx(1 - theirs.win_rate, abs=1e-6)
    assert ours.standard_error == pytest.approx(theirs.standard_error, abs=1e-6, nan_ok=True)
    assert ours.length_effect == pytest.approx(theirs.length_effect, abs=1e-5)
    assert 0 < ours.win_rate < 1


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("num", [4, 20, 300])
def test_who_always_wins_is_not_certain_to(num, samples):
    """The interval ends near the exact binomial one, and neither end is 1."""
    rng = np.random.default_rng(num)
    _, lengths_a, lengths_b, prompts = judged(rng, num, samples=samples)
    found = length_controlled_win_rate(np.ones(num * samples), lengths_a, lengths_b, prompts)
    low, high = found.interval
    assert 1 - 1.5 / num < found.win_rate < high < 1
    assert low > 1 - 12 / num
    assert low < stats.binomtest(num * samples, num * samples).proportion_ci(0.95).low
    lost = length_controlled_win_rate(np.zeros(num * samples), lengths_b, lengths_a, prompts)
    assert lost.interval == pytest.approx((1 - high, 1 - low), abs=1e-4)


def test_rows_may_come_in_any_order():
    rng = np.random.default_rng(10)
    rows = judged(rng, 30, samples=4, quality=0.5, length=1.0, prompt_sd=2.0)
    order = rng.permutation(120)
    ours = length_controlled_win_rate(*rows)
    theirs = length_controlled_win_rate(*(np.array(column)[order] for column in rows))
    assert ours.prompt_sd > 1
    assert ours.interval == pytest.approx(theirs.interval, abs=1e-6)


def test_prompts_that_always_agree():
    """Every prompt is always won or always lost: u_x without bound but for its prior."""
    rng = np.random.default_rng(6)
    _, lengths_a, lengths_b, prompts = judged(rng, 40, samples=4)
    prob = np.repeat(np.arange(40) % 2, 4).astype(float)
    found = length_controlled_win_rate(prob, lengths_a, lengths_b, prompts)
    assert found.win_rate == pytest.approx(0.5, abs=0.02)
    assert found.standard_error == pytest.approx(0.5 / math.sqrt(39), rel=0.05)


def test_what_has_no_verdict_is_counted():
    rng = np.random.default_rng(7)
    prob, *lengths, _ = judged(rng, 30)
    without = length_controlled_win_rate(prob, *lengths)
    longer = [np.append(each, [7.0, 900.0]) for each in lengths]
    found = length_controlled_win_rate(np.append(prob, [math.nan] * 2), *longer)
    assert (found.num_comparisons, found.num_missing) == (30, 2)
    assert (found.win_rate, found.interval) == (without.win_rate, without.interval)
    one = length_controlled_win_rate([1.0, 0.0], [3, 4], [5, 2], ["p", "p"])
    assert math.isnan(one.standard_error)
    assert all(map(math.isnan, one.interval))


@pytest.mark.parametrize(
    ("prob", "lengths_a", "lengths_b", "prompts", "message"),
    [
        ([0.5, 2.0], [1, 2], [2, 1], None, "prob_a: row 1 is 2.0"),
        ([0.5, 1.0], [1, 2, 3], [2, 1], None, "lengths_a has shape"),
        ([0.5, 1.0], [1, 2], [2, -1], None, "lengths_b: row 1 is -1.0, not a length"),
        ([0.5, 1.0], [1, math.nan], [2, 1], None, "lengths_a: row 1 is nan"),
        ([0.5, 1.0], [1, 2], [2, 1], ["p"], "1 prompts for 2 comparisons"),
        ([math.nan] * 2, [1, 2], [2, 1], None, "none of 2 comparisons"),
        ([0.5, 1.0], [11, 12], [1, 2], None, "longer by 10 than B's"),
        ([0.5, 1.0], [1, 2], [4, 5], None, "shorter by 3 than B's"),
    ],
)
def test_mistakes_are_named(prob, lengths_a, lengths_b, prompts, message):
    with pytest.raises(TokenRatioError, match=message):
        length_controlled_win_rate(prob, lengths_a, lengths_b, prompts)


# --- AlpacaEval 2's leaderboard


@pytest.mark.parametrize("prompts", [None, [i // 2 for i in range(40)]])
@pytest.mark.parametrize(
    ("prob", "expected"), [([0.5] * 40, 0.5), ([0, 1] * 20, 0.5), ([1] * 40, 1), ([0] * 40, 0)]
)
def test_against_itself_our_own_fit_is_the_raw_rate_up_to_the_prior(prob, prompts, expected):
    lengths = [100 + i for i in range(40)]
    found = length_controlled_win_rate(prob, lengths, lengths, prompts)
    assert found.length_effect == pytest.approx(0, abs=1e-9)
    assert found.win_rate == pytest.approx(expected, abs=0.5 / 40)
    low, high = found.interval
    assert 0 < low < found.win_rate < high < 1
