"""The exact value of each token of a review: Q_ref and A_ref in the review world."""

import math
from collections.abc import Sequence

import numpy as np

from tokenratio.data.worlds.grammar import Stack, StochasticGrammar
from tokenratio.data.worlds.protocol import TokenValues
from tokenratio.data.worlds.review_grammar import ReviewGrammar
from tokenratio.data.worlds.review_reward import ReviewReward

# Values that are equal must be ties: sums in another order differ in the last digits.
_DECIMALS = 10


class ReviewValues:
    """Exact Q_ref and A_ref of the review world's tokens under its own grammar as π_ref.

    docs/method.md §1. Later words depend on the grammar's stack, their rewards on the state of the
    reward function; both are finite, so V_ref is a sum over a small graph.
    """

    def __init__(self, grammar: ReviewGrammar, reward: ReviewReward) -> None:
        self._start = grammar.start
        self._grammar = StochasticGrammar(grammar.productions)
        self._reward = _RewardStates(reward)
        self._values: dict[tuple[Stack, int], float] = {}

    def of_response(self, prompt: str, words: Sequence[str]) -> TokenValues:
        """Values of each word, EOS included where it is one of `words`; rounded to 1e-10.

        nan from the first word that the grammar cannot produce there: π_ref has no such state.
        """
        stack, state = self._start(prompt), 0
        action_values = np.full(len(words), math.nan)
        advantages = action_values.copy()
        for index, word in enumerate(words):
            following = self._grammar.next_words(stack)
            if word not in following:
                break
            value = self._value(stack, state)
            reward, state = self._reward.step(state, word)
            stack = following[word][1]
            action_values[index] = reward + self._value(stack, state)
            advantages[index] = action_values[index] - value
        return TokenValues(action_values.round(_DECIMALS), advantages.round(_DECIMALS))

    def _value(self, stack: Stack, state: int) -> float:
        """V_ref: the expected sum of the rewards still to come."""
        if not stack:
            return 0.0
        if (stack, state) not in self._values:
            terms = []
            for word, (prob, rest) in self._grammar.next_words(stack).items():
                reward, after = self._reward.step(state, word)
                terms.append(prob * (reward + self._value(rest, after)))
            self._values[stack, state] = math.fsum(terms)
        return self._values[stack, state]


class _RewardStates:
    """The states of the review reward, found from its values for probe words.

    The reward depends on the negations and degree word in force, the number of opinions so far and
    whether there was a full stop. Texts with the same values for the probes agree in all of these,
    so one can represent the others. State 0 is the empty text.
    """

    # The degree in force; then sign, number of opinions, full stop.
    _PROBES = (("good",), ("very", "good", "good", "."))
    # It distinguishes all states: no constant is 0, and nothing is rounded away.
    _ASKED = ReviewReward(token=0.0)

    def __init__(self, reward: ReviewReward) -> None:
        self._reward = reward
        self._texts: list[tuple[str, ...]] = [()]
        self._states = {self._answers(()): 0}
        self._steps: dict[tuple[int, str], tuple[float, int]] = {}

    def step(self, state: int, word: str) -> tuple[float, int]:
        """The reward of a word in a state, and the state after it."""
        if (state, word) not in self._steps:
            text = (*self._texts[state], word)
            answers = self._answers(text)
            if answers not in self._states:
                self._states[answers] = len(self._texts)
                self._texts.append(text)
            reward = self._reward.token_rewards(text)[-1]
            self._steps[state, word] = (reward, self._states[answers])
        return self._steps[state, word]

    def _answers(self, text: tuple[str, ...]) -> tuple[float, ...]:
        return tuple(
            reward
            for probe in self._PROBES
            for reward in self._ASKED.token_rewards([*text, *probe])[len(text) :]
        )
