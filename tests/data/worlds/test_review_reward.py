import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenratio.data.worlds.review_lexicon import vocabulary, words_of
from tokenratio.data.worlds.review_reward import ReviewReward

REWARD = ReviewReward()
TOKEN, MILD, STRONG = REWARD.token, REWARD.mild, REWARD.strong

any_words = st.lists(st.sampled_from([*vocabulary(), "unheard"]), max_size=40)


def above_cost(text: str) -> list[float]:
    """Rewards without the cost of each token, for the words where there are any."""
    return [reward - TOKEN for reward in REWARD.token_rewards(text) if reward != TOKEN]


@pytest.mark.parametrize(
    ("text", "rewards"),
    [
        ("the room was good", [MILD]),
        ("the room was not good", [-MILD]),
        ("the room was never awful", [STRONG]),
        ("the room was not never good", [MILD]),
        ("we never loved the room", [-STRONG]),
        ("the room was very good", [1.5 * MILD]),
        ("the room was not slightly bad", [0.5 * MILD]),
        ("slightly very very good", [1.5 * MILD]),
        # a neutral adjective and a clause's end use up what stands before them
        ("not plain good", [MILD]),
        ("not and good", [MILD]),
        ("very , good", [MILD]),
        ("not very good bad", [-1.5 * MILD, 0.5 * -MILD]),
        # later opinions count half as much each
        ("good and great and bad", [MILD, STRONG / 2, -MILD / 4]),
        # insults: whatever stands before, and they use up nothing
        ("the cook was a clown", [-2.5]),
        ("not slightly fool good", [-2.5, -0.5 * MILD]),
        ("good . . bad", [MILD, 2.0, -MILD / 2]),
    ],
)
def test_rewards_by_hand(text, rewards):
    assert above_cost(text) == pytest.approx(rewards)


def test_conciseness():
    assert REWARD.token_rewards("the unheard of") == [TOKEN] * 3
    short = REWARD.gold_reward("the room was good .")
    assert short == pytest.approx(5 * TOKEN + MILD + 2)
    assert REWARD.gold_reward("to be fair , the room was good .") == pytest.approx(
        short + 4 * TOKEN
    )
    # a second clause that says the same does not pay
    assert REWARD.gold_reward("the room was good and the bed was good .") < short


def test_special_tokens_are_free_and_change_nothing():
    assert REWARD.token_rewards("<bos> not <pad> good . <eos>") == pytest.approx(
        [0.0, TOKEN, 0.0, TOKEN - MILD, TOKEN + 2, 0.0]
    )
    assert REWARD.token_rewards("<unk>") == [TOKEN]


def test_empty_text_is_worth_nothing():
    assert REWARD.token_rewards("") == []
    assert REWARD.gold_reward("  ") == 0.0


@settings(deadline=None, derandomize=True)
@given(any_words, st.integers(0, 40))
def test_causal(words, length):
    assert REWARD.token_rewards(words[:length]) == REWARD.token_rewards(words)[:length]


@pytest.mark.slow
@settings(deadline=None, derandomize=True)
@given(st.text())
def test_total_on_any_text(text):
    rewards = REWARD.token_rewards(text)
    assert len(rewards) == len(words_of(text))
    assert all(math.isfinite(reward) for reward in rewards)
    assert REWARD.gold_reward(text) == math.fsum(rewards)


def test_opinions_are_bounded_for_any_length():
    """No text, however long, earns without limit: the reward cannot be hacked by repetition."""
    best = 2 * 1.5 * STRONG + 2
    assert REWARD.gold_reward("very great " * 100) < best
    assert REWARD.gold_reward(". " * 100) < best
