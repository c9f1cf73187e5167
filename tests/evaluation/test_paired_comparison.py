import math
from dataclasses import replace
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.paired_comparison import (
    PolicyComparison,
    PolicyValues,
    holm,
    holm_p_values,
    paired_comparison,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=50)


def pair(differences, *, num_samples=1):
    """Two policies whose values differ so: rows are prompts, columns seeds."""
    differences = np.asarray(differences, float)
    prompts, seeds = np.divmod(np.arange(differences.size), differences.shape[1])
    level = np.repeat(prompts / 7, num_samples)
    spread = np.tile(np.arange(num_samples) - (num_samples - 1) / 2, differences.size)
    rows = {
        "prompts": np.repeat(prompts, num_samples).tolist(),
        "seeds": np.repeat(seeds, num_samples).tolist(),
    }
    values_a = level + np.repeat(differences.ravel(), num_samples) + spread
    return PolicyValues("A", values_a.tolist(), **rows), PolicyValues("B", level.tolist(), **rows)


def normal_pair(rng, num_prompts, num_seeds=1, *, mean=0.0, prompt=1.0, seed=0.0, noise=1.0):
    return pair(
        mean
        + prompt * rng.normal(size=(num_prompts, 1))
        + seed * rng.normal(size=num_seeds)
        + noise * rng.normal(size=(num_prompts, num_seeds))
    )


def test_against_the_paired_t_test():
    """scipy's, for normal differences, where it is exact."""
    rng = np.random.default_rng(0)
    for mean in (0.0, 0.3, 0.6):
        a, b = normal_pair(rng, 60, mean=mean)
        found = paired_comparison(a, b, num_resamples=40_000)
        theirs = stats.ttest_rel(a.values, b.values)
        low, high = theirs.confidence_interval(0.95)
        assert found.difference == pytest.approx(np.mean(a.values) - np.mean(b.values))
        assert found.standard_error == pytest.approx(found.difference / theirs.statistic)
        assert found.interval == pytest.approx((low, high), abs=0.02 * (high - low))
        assert found.p_value == pytest.approx(theirs.pvalue, abs=0.015)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_prompts", "num_seeds", "seed_sd", "draw"),
    [
        (12, 1, 0.0, "normal"),
        (40, 1, 0.0, "normal"),
        (100, 1, 0.0, "exponential"),
        (100, 1, 0.0, "wins"),
        (60, 3, 0.0, "normal"),
        (60, 3, 0.3, "normal"),
        (60, 5, 1.0, "normal"),
    ],
)
def test_intervals_hold_the_truth(num_prompts, num_seeds, seed_sd, draw):
    """In 95 % of cases, and with a p-value under 5 % in 5 % where there is no difference."""
    rng = np.random.default_rng(num_prompts + num_seeds)
    num, covered, rejected = 400, 0, 0  # three standard errors are 0.033
    shape = (num_prompts, num_seeds)
    for seed in range(num):
        if draw == "normal":
            values = rng.normal(size=(num_prompts, 1)) + rng.normal(size=shape)
            values += seed_sd * rng.normal(size=num_seeds)
        elif draw == "exponential":
            values = rng.exponential(size=shape) - 1
        else:
            values = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=shape)
        found = paired_comparison(*pair(values), num_resamples=800, seed=seed)
        covered += abs(found.difference) <= found.half_width
        rejected += found.p_value < 0.05
    assert 0.92 < covered / num < 0.98
    assert 0.02 < rejected / num < 0.08


def test_ignoring_seeds_would_not_do():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        found = paired_comparison(*normal_pair(rng, 60, 3, seed=0.5), num_resamples=500, seed=seed)
        covered += abs(found.difference) <= 1.96 * math.sqrt(found.prompt_variance)
    assert covered < 70


def test_variance_of_the_two_way_layout():
    """Against the variance over many draws of prompts, seeds and noise."""
    rng = np.random.default_rng(2)
    found = [
        paired_comparison(
            *normal_pair(rng, 30, 4, prompt=1.0, seed=0.7, noise=2.0), num_resamples=1
        )
        for _ in range(400)
    ]
    truth = 1 / 30 + 0.7**2 / 4 + 4 / 120
    assert np.var([each.difference for each in found]) == pytest.approx(truth, rel=0.2)
    assert np.mean([each.standard_error**2 for each in found]) == pytest.approx(truth, rel=0.1)


@PROPERTY
@given(
    st.lists(st.floats(-10, 10), min_size=4, max_size=40).filter(lambda row: len(row) % 2 == 0),
    st.sampled_from([1, 2]),
    st.integers(1, 3),
)
def test_swapping_negates(differences, num_seeds, num_samples):
    a, b = pair(np.reshape(differences, (-1, num_seeds)), num_samples=num_samples)
    one = paired_comparison(a, b, num_resamples=200)
    other = paired_comparison(b, a, num_resamples=200)
    assert other == replace(one, name_a="B", name_b="A", difference=-one.difference)


def test_rows_may_come_in_any_order():
    rng = np.random.default_rng(3)
    a, b = normal_pair(rng, 20, 3)
    order = rng.permutation(60)
    shuffled = PolicyValues("A", *(list(np.array(each)[order]) for each in (a.values, a.prompts)))
    shuffled = replace(shuffled, seeds=list(np.array(a.seeds)[order]))
    assert paired_comparison(shuffled, b) == paired_comparison(a, b)
    assert paired_comparison(a, b, seed=1) != paired_comparison(a, b)


def test_samples_of_a_prompt_are_one_draw():
    rng = np.random.default_rng(4)
    a, b = normal_pair(rng, 30)
    repeated = [replace(each, values=each.values * 5, prompts=each.prompts * 5) for each in (a, b)]
    repeated = [replace(each, seeds=None) for each in repeated]
    found, once = paired_comparison(*repeated), paired_comparison(a, b)
    assert found.standard_error == pytest.approx(once.standard_error)
    assert found.p_value == once.p_value


def test_few_prompts_show_nothing():
    """Five wins of five: the signs agree by chance in one case of 16."""
    five = paired_comparison(*pair([[1.0]] * 5))
    assert five.p_value == pytest.approx(1 / 16, abs=0.01)
    assert math.isinf(five.smallest_visible())
    assert "are too few to see any" in five.line()
    ten = paired_comparison(*pair([[1.0]] * 10))
    assert ten.p_value == pytest.approx(2 / 1024, abs=0.002)
    same = paired_comparison(*pair([[0.0]] * 10))
    assert (same.p_value, same.standard_error, same.interval) == (1.0, 0.0, (0.0, 0.0))


def test_smallest_visible_difference_is_seen_in_four_cases_of_five():
    rng = np.random.default_rng(5)
    found = paired_comparison(*normal_pair(rng, 2000, prompt=1.0, noise=0.0))
    needed = found.smallest_visible(25)
    # The exact power of a t-test, from the noncentral t.
    edge, shift = stats.t.ppf(0.975, 24), needed / math.sqrt(found.prompt_variance * 2000 / 25)
    assert stats.nct.sf(edge, 24, shift) == pytest.approx(0.8, abs=0.01)
    assert found.smallest_visible() == pytest.approx(2.8 * found.standard_error, rel=0.01)
    seen = sum(
        paired_comparison(
            *normal_pair(rng, 25, mean=needed, noise=0.0), num_resamples=500
        ).significant
        for _ in range(200)
    )
    assert 0.7 < seen / 200 < 0.9
    # More prompts do not make up for three seeds.
    seeds = paired_comparison(*normal_pair(rng, 200, 3, seed=1.0))
    assert seeds.smallest_visible(10**6) > 0.5 * seeds.smallest_visible()


def closed_testing(p_values):
    """Holm's by its definition: reject i if Bonferroni rejects every set of hypotheses with i."""
    indices = range(len(p_values))
    sets = list(
        chain.from_iterable(combinations(indices, size) for size in range(1, len(p_values) + 1))
    )
    return [
        max(min(1.0, len(each) * min(p_values[j] for j in each)) for each in sets if i in each)
        for i in indices
    ]


@PROPERTY
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_closed_bonferroni(p_values):
    assert holm_p_values(p_values) == pytest.approx(closed_testing(p_values))


def test_holm_by_hand():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm_p_values([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_p_values([]) == []


FOUND = PolicyComparison(
    name_a="tbpo",
    name_b="dpo",
    difference=0.041,
    prompt_variance=0.013**2,
    seed_variance=0.0,
    half_width=0.026,
    p_value=0.002 / 3,
    num_prompts=200,
    num_seeds=1,
    num_unpaired=0,
    adjusted_p=0.002,
    num_comparisons=3,
    unit="share",
)


def test_the_line():
    assert FOUND.line() == (
        "tbpo wins by 4.1 ± 1.3 points (95 % interval 1.5 to 6.7), p = 0.002 after Holm over 3 "
        "comparisons; n = 200 prompts would need ≥ 3.7 to see (80 % power)"
    )
    loses = replace(FOUND, difference=-0.041)
    assert loses.line().startswith("dpo wins by 4.1 ± 1.3 points (95 % interval 1.5 to 6.7)")
    lower = replace(FOUND, unit="nats", better="lower").line()
    assert lower.startswith("dpo wins by 0.041 ± 0.013 nats (95 % interval 0.015 to 0.067)")
    unsure = replace(loses, adjusted_p=0.31, num_comparisons=1, num_unpaired=2, num_seeds=3)
    assert unsure.line() == (
        "no difference seen between tbpo and dpo: -4.1 ± 1.3 points (95 % interval -6.7 to -1.5), "
        "p = 0.31; n = 200 prompts and 3 seeds would need ≥ 3.7 to see (80 % power); 2 prompts "
        "left out that only one policy answered in full"
    )
    assert "p < 0.001;" in replace(FOUND, adjusted_p=1e-4, num_comparisons=1).line()


def test_holm_over_comparisons():
    rng = np.random.default_rng(6)
    found = [paired_comparison(*normal_pair(rng, 30, mean=mean)) for mean in (0.6, 0.8, 0.0)]
    adjusted = holm(found)
    assert [each.adjusted_p for each in adjusted] == holm_p_values([each.p_value for each in found])
    assert {each.num_comparisons for each in adjusted} == {3}
    assert [each.significant for each in adjusted] == [each.adjusted_p < 0.05 for each in adjusted]


def test_samples_are_averaged_and_unpaired_prompts_counted():
    a = PolicyValues("A", [0.0, 2.0, 3.0, 4.0, 2.0], ["p", "q", "r", "only A", "p"])
    b = PolicyValues("B", [0.0, 0.0, 0.0], ["q", "p", "r"])
    found = paired_comparison(a, b)
    assert (found.num_prompts, found.num_unpaired, found.difference) == (3, 1, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [0.0, math.nan, 0.0]}, "B: value 1 .prompt 'q'. is nan"),
        ({"prompts": ["p"]}, "B: 3 values, 1 prompts"),
        ({"prompts": ["x", "y", "z"]}, "A and B share 0 of 6 prompts"),
        ({"seeds": [0, 0, 0]}, "not run with the same seeds: only one has 0, None"),
    ],
)
def test_mistakes_are_named(change, message):
    a = PolicyValues("A", [1.0, 2.0, 3.0], ["p", "q", "r"])
    with pytest.raises(TokenRatioError, match=message):
        paired_comparison(a, replace(a, name="B", **change))
    with pytest.raises(TokenRatioError, match="num_resamples"):
        paired_comparison(a, a, num_resamples=0)
