import math

import pytest

from tokenratio.evaluation.fooled_reward import MOST_PERPLEXITY, fooled_reward
from tokenratio.evaluation.results import Measure

BEFORE = {"gold_reward": 1.0, "perplexity_ref": 20.0, "diversity/distinct_2": 0.9}
ERRORS = {"gold_reward": 0.1, "perplexity_ref": 1.0, "diversity/distinct_2": 0.01}


def measures(**changes):
    values = BEFORE | changes
    return [Measure(name, value, ERRORS[name], 100) for name, value in values.items()]


def found(**changes):
    return fooled_reward(measures(), measures(**changes))


def test_a_better_policy_is_not_warned_of():
    assert found(gold_reward=3.0) == []
    assert found(gold_reward=3.0, perplexity_ref=20.0 * MOST_PERPLEXITY) == []
    assert found(gold_reward=3.0, **{"diversity/distinct_2": 0.88}) == []


def test_unlikely_answers():
    (line,) = found(gold_reward=3.0, perplexity_ref=20.0 * MOST_PERPLEXITY + 1)
    assert "perplexity_ref went from 20 to 31:" in line
    assert "distinct" not in line


def test_repetitive_answers():
    (line,) = found(gold_reward=3.0, **{"diversity/distinct_2": 0.8})
    assert line.startswith("WATCH: the gold reward rose, but diversity/distinct_2 went from 0.9 to")


@pytest.mark.parametrize("reward", [1.0, 1.2, -3.0, math.nan])
def test_without_a_rise_there_is_nothing_to_explain(reward):
    assert found(gold_reward=reward, perplexity_ref=500.0) == []


def test_missing_measures():
    assert fooled_reward([], measures(gold_reward=3.0)) == []
    assert fooled_reward(measures(), []) == []
    assert fooled_reward(measures()[:1], measures(gold_reward=3.0)) == []
