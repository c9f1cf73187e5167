import itertools
import math

import pytest

from tokenratio.data.worlds.pairs import preference_pairs
from tokenratio.data.worlds.reviews import ReviewWorld
from tokenratio.errors import TokenRatioError

WORLD = ReviewWorld()


def fixed_sampler(prompts, num_samples):
    return [["one", "two"] for _ in prompts]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_labels_follow_bradley_terry(temperature):
    num, margin = 4000, 0.8
    rows = preference_pairs(
        ["x"] * num,
        fixed_sampler,
        {"one": 0.5, "two": 0.5 - margin}.__getitem__,
        seed=0,
        temperature=temperature,
    )
    prob = 1 / (1 + math.exp(-margin / temperature))
    frequency = sum(row["chosen"] == "one" for row in rows) / num
    assert frequency == pytest.approx(prob, abs=4 * math.sqrt(prob * (1 - prob) / num))


def test_equal_rewards_are_a_toss_of_the_coin():
    rows = preference_pairs(["x"] * 2000, fixed_sampler, lambda _: 1.0, seed=0)
    assert 0.45 < sum(row["chosen"] == "one" for row in rows) / len(rows) < 0.55


def test_huge_margins_do_not_overflow():
    for size in (1e6, -1e6):
        (row,) = preference_pairs(["x"], fixed_sampler, {"one": size, "two": 0.0}.get, seed=0)
        assert row["chosen_reward"] > row["rejected_reward"]


def test_flips_reverse_labels_and_nothing_else():
    clean, noisy, reversed_ = (
        WORLD.preference_pairs(1000, seed=4, flip_rate=rate) for rate in (0.0, 0.2, 1.0)
    )
    assert 0.15 < sum(row["flipped"] for row in noisy) / 1000 < 0.25
    assert not any(row["flipped"] for row in clean)
    for before, after, swapped in zip(clean, noisy, reversed_, strict=True):
        assert before["prompt"] == after["prompt"]
        assert (after["chosen"] == before["rejected"]) == after["flipped"]
        assert (swapped["chosen"], swapped["rejected"]) == (before["rejected"], before["chosen"])


def test_rows_carry_their_gold_rewards():
    for row in WORLD.preference_pairs(50, seed=4):
        assert row["chosen_reward"] == WORLD.gold_reward(row["chosen"])
        assert row["rejected_reward"] == WORLD.gold_reward(row["rejected"])
        assert row["chosen"] != row["rejected"]


def test_identical_and_blank_responses_are_drawn_again_and_counted():
    draws = itertools.count()

    def sampler(prompts, num_samples):
        assert num_samples == 2
        drawn = {
            0: [["a", "a"], ["a", "b"], [" ", "b"]],
            1: [["a b", "a  b"], ["c", "d"]],
            2: [["e", "f"]],
        }
        return drawn[next(draws)]

    rows = preference_pairs(["x", "y", "z"], sampler, len, seed=0)
    assert [{row["chosen"], row["rejected"]} for row in rows] == [
        {"e", "f"},
        {"a", "b"},
        {"c", "d"},
    ]
    assert [row["redrawn"] for row in rows] == [2, 0, 1]


def test_a_sampler_that_never_differs_is_an_error():
    with pytest.raises(TokenRatioError, match="1 of 1 prompts did not get two different responses"):
        preference_pairs(["x"], lambda prompts, _: [["a", "a"] for _ in prompts], len, seed=0)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": math.nan}, {"flip_rate": 1.1}]
)
def test_bad_settings(options):
    with pytest.raises(TokenRatioError, match=next(iter(options))):
        preference_pairs(["x"], fixed_sampler, len, seed=0, **options)
