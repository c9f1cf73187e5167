import itertools
import statistics

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.frontier import (
    PolicyPoint,
    compare_frontiers,
    non_dominated,
    policy_point,
)

exact = settings(deadline=None, derandomize=True)
coarse = st.integers(0, 8).map(lambda i: i / 4)  # coarse, so that points meet and line up
clouds = st.lists(st.tuples(coarse, coarse), min_size=1, max_size=7)
REFERENCE = PolicyPoint("ref", 0.0, 1.0)


def points_of(cloud):
    return [PolicyPoint(str(i), kl, reward) for i, (kl, reward) in enumerate(cloud)]


def frontier_of(cloud, reference=REFERENCE, **settings):
    return compare_frontiers({"m": points_of(cloud)}, reference, **settings)["m"]


def height_by_mixtures(cloud, budget):
    """The best reward that tossing a coin between two policies gives within a KL budget."""
    attained = [(0.0, REFERENCE.reward), *cloud]
    best = max(reward for kl, reward in attained if kl <= budget)
    for (kl_0, reward_0), (kl_1, reward_1) in itertools.permutations(attained, 2):
        if kl_0 < budget < kl_1:
            share = (budget - kl_0) / (kl_1 - kl_0)
            best = max(best, (1 - share) * reward_0 + share * reward_1)
    return best


@exact
@given(clouds)
def test_the_hull_is_what_mixtures_attain(cloud):
    hull = frontier_of(cloud, budget=3.0).hull
    for budget in np.linspace(0, 3, 25):
        expected = height_by_mixtures(cloud, budget)
        assert np.interp(budget, *zip(*hull, strict=True)) == pytest.approx(expected)
    kls, rewards = zip(*hull, strict=True)
    assert list(kls) == sorted(set(kls))
    assert list(rewards) == sorted(set(rewards))
    slopes = np.diff(rewards) / np.diff(kls)
    assert (np.diff(slopes) < 0).all()  # no corner lies on a line


@exact
@given(clouds)
def test_the_area_is_the_mean_height(cloud):
    frontier = frontier_of(cloud, budget=1.7, unit=1.5)
    kls = np.linspace(0, 1.7, 4001)
    heights = np.interp(kls, *zip(*frontier.hull, strict=True)) - REFERENCE.reward
    assert frontier.area == pytest.approx(heights.mean() / 1.5, abs=2e-3)


def test_by_hand():
    # straight to the top at the budget: half; at half the budget: three quarters
    assert frontier_of([(2.0, 3.0)]).area == pytest.approx(0.5)
    assert frontier_of([(1.0, 3.0), (2.0, 2.0)]).area == pytest.approx(0.75)
    # a policy past the budget counts by what mixing with it gives
    assert frontier_of([(2.0, 3.0)], budget=1.0, unit=2.0).area == pytest.approx(0.25)


def test_the_reference_itself_has_area_0():
    assert frontier_of([(2.0, 1.0)]).area == 0.0
    assert frontier_of([(2.0, -3.0), (1.0, 0.5)]).area == 0.0
    assert frontier_of([(2.0, 0.0)], unit=4.0).area == 0.0


@exact
@given(clouds, st.tuples(coarse, coarse))
def test_another_policy_never_hurts(cloud, other):
    fixed = {"budget": 2.0, "unit": 3.0}
    assert frontier_of([*cloud, other], **fixed).area >= frontier_of(cloud, **fixed).area - 1e-12


@exact
@given(clouds, st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-5, 5))
def test_units_do_not_matter(cloud, kl_unit, reward_unit, shift):
    assume(max(kl for kl, _ in cloud) > 0)
    area = frontier_of(cloud).area
    scaled = [(kl_unit * kl, reward_unit * reward + shift) for kl, reward in cloud]
    reference = PolicyPoint("ref", 0.0, reward_unit * REFERENCE.reward + shift)
    assert frontier_of(scaled, reference).area == pytest.approx(area, abs=1e-9)
    assert 0 <= area <= 1


@exact
@given(clouds)
def test_dominated_points(cloud):
    def dominates(one, other):
        return one != other and one[0] <= other[0] and one[1] >= other[1]

    kept = [point for point in cloud if not any(dominates(other, point) for other in cloud)]
    best = non_dominated(points_of(cloud))
    assert [(point.kl, point.reward) for point in best] == sorted(kept)
    frontier = frontier_of(cloud, budget=1.0)
    assert {point.label for point in frontier.points} | {*frontier.dominated} == {
        str(i) for i in range(len(cloud))
    }
    assert len(frontier.points) + len(frontier.dominated) == len(cloud)


def test_methods_share_the_yardstick():
    near, far = points_of([(1.0, 2.0)]), points_of([(4.0, 5.0), (0.5, 1.5)])
    compared = compare_frontiers({"near": near, "far": far}, REFERENCE)
    assert {each.budget for each in compared.values()} == {1.0}
    # within KL 1 mixing gives `far` 1.5 + 0.5 · 3.5 / 3.5
    assert {each.unit for each in compared.values()} == {1.0}
    assert compared["near"].area == pytest.approx(0.5)
    assert compared["far"].area == pytest.approx(0.5)


def responses(rng, num_prompts, kl, reward, shared, *, per_prompt=2):
    prompts = np.repeat(np.arange(num_prompts), per_prompt)
    kls = kl + 0.3 * rng.normal(size=len(prompts))
    rewards = reward + shared[prompts] + 0.5 * rng.normal(size=len(prompts))
    return kls, rewards, prompts


def experiment(seed, num_prompts=50):
    rng = np.random.default_rng(seed)
    shared = 2 * rng.normal(size=num_prompts)  # some prompts are easier for everyone
    reference = policy_point(
        "ref", *[np.zeros(2 * num_prompts), *responses(rng, num_prompts, 0, 0, shared)[1:]]
    )
    methods = {
        "a": [
            policy_point(f"a{k}", *responses(rng, num_prompts, k, k**0.5, shared)) for k in (1, 3)
        ],
        "b": [policy_point("b", *responses(rng, num_prompts, 3.0, 1.2, shared))],
    }
    return methods, reference


def test_the_bootstrap_is_the_spread_of_repetitions():
    fixed = {"budget": 3.0, "unit": 2.0}
    repeated = [
        compare_frontiers(*experiment(seed), **fixed, num_bootstrap=0) for seed in range(120)
    ]
    one = compare_frontiers(*experiment(500), **fixed, num_bootstrap=400)
    for name in ("a", "b"):
        spread = statistics.stdev(each[name].area for each in repeated)
        assert one[name].standard_error == pytest.approx(spread, rel=0.35)
        assert one[name].low < one[name].area < one[name].high
    differences = np.subtract(one["a"].resampled, one["b"].resampled)
    spread = statistics.stdev(each["a"].area - each["b"].area for each in repeated)
    assert differences.std() == pytest.approx(spread, rel=0.35)


def test_prompts_are_drawn_together_for_all():
    """With nothing but the prompts' own ease, every difference from the reference is exact."""
    ease = np.random.default_rng(0).normal(size=30)
    prompts = [f"prompt {i}" for i in range(30)]
    reference = policy_point("ref", [0.0] * 30, ease, prompts)
    better = policy_point("better", [2.0] * 30, ease + 1.0, prompts)
    frontier = compare_frontiers({"m": [better]}, reference, num_bootstrap=50)["m"]
    assert frontier.resampled == pytest.approx([0.5] * 50)
    rng = np.random.default_rng(1)
    noisy = policy_point("noisy", [2.0] * 30, ease + 2 + rng.normal(size=30), prompts)
    both = compare_frontiers({"m": [noisy], "same": [noisy]}, reference, num_bootstrap=50)
    assert both["m"].resampled == both["same"].resampled
    assert both["m"].standard_error > 0


def test_no_bootstrap_without_responses():
    frontier = frontier_of([(1.0, 2.0)])
    assert np.isnan([frontier.standard_error, frontier.low, frontier.high]).all()
    assert frontier.resampled == ()


def test_means_of_a_policy():
    point = policy_point("x", [1.0, 2.0, 6.0], [1.0, 0.0, 2.0], ["p", "p", "q"])
    assert (point.kl, point.reward) == (3.0, 1.0)
    assert point.by_prompt == {"p": (3.0, 1.0, 2), "q": (6.0, 2.0, 1)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PolicyPoint("x", -0.1, 0.0), "policy x: .* not negative"),
        (lambda: PolicyPoint("x", 1.0, float("nan")), "policy x: .* finite"),
        (lambda: policy_point("x", [1.0], [1.0, 2.0], ["p"]), "policy x: 1 KLs, 2 rewards"),
        (lambda: policy_point("x", [], [], []), "policy x: 0 KLs"),
        (lambda: frontier_of([(1, 2)], PolicyPoint("ref", 0.2, 0.0)), "it must be 0"),
        (lambda: compare_frontiers({"m": []}, REFERENCE), "method m has no policy"),
        (lambda: frontier_of([(0.0, 2.0)]), "budget must be positive"),
        (lambda: frontier_of([(1.0, 2.0)], unit=0.0), "unit of reward must be positive"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(TokenRatioError, match=message):
        call()


def test_other_prompts_are_refused():
    reference = policy_point("ref", [0.0, 0.0], [1.0, 2.0], ["p", "q"])
    other = policy_point("other", [1.0, 1.0], [1.0, 2.0], ["p", "r"])
    with pytest.raises(TokenRatioError, match=r"policy other and the reference .* 2 have"):
        compare_frontiers({"m": [other]}, reference)
