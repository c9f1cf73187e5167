"""The gold reward of a review, token by token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokenratio.data.worlds import review_lexicon as lexicon
from tokenratio.data.worlds.review_lexicon import words_of

_MILD_GOOD, _MILD_BAD = (
    lexicon.MILD_GOOD + lexicon.MILD_LIKE,
    lexicon.MILD_BAD + lexicon.MILD_DISLIKE,
)
_MILD = frozenset(_MILD_GOOD + _MILD_BAD)
_GOOD = frozenset(_MILD_GOOD + lexicon.STRONG_GOOD + lexicon.STRONG_LIKE)
_BAD = frozenset(_MILD_BAD + lexicon.STRONG_BAD + lexicon.STRONG_DISLIKE)


@dataclass(frozen=True)
class ReviewReward:
    """r(s_t, a_t) of any text: a word's reward depends only on it and on the words before it.

    The reward of a word is `token`, plus:

    - an opinion (good or bad adjective or verb): ±`mild` or ±`strong`, times `later`^n after n
      earlier opinions in the text, times −1 for each negation and times the factor of the last
      degree word between it and the opinion, neutral adjective or end of clause before it;
    - a neutral adjective: nothing, but it ends the effect of negations and degree words before it;
    - an insult: `insult`, whatever comes before it;
    - the first full stop: `finished`.

    A clause ends at a connective, a comma or a full stop. Special tokens have reward 0 and no
    effect; any other word has only the reward `token`.

    Attributes:
        mild, strong: size of an opinion.
        intensifier, diminisher: factor of a degree word ("very", "slightly").
        later: an opinion's weight relative to the one before it, so that length does not pay.
        insult, token, finished: as above.
    """

    mild: float = 0.6
    strong: float = 1.2
    intensifier: float = 1.5
    diminisher: float = 0.5
    later: float = 0.5
    insult: float = -2.5
    token: float = -0.1
    finished: float = 2.0

    def token_rewards(self, text: str | Sequence[str]) -> list[float]:
        """Reward of each word of `text` (split by `words_of` if a str), special tokens included."""
        words = words_of(text) if isinstance(text, str) else text
        rewards = []
        sign, degree, weight, stopped = 1.0, 1.0, 1.0, False
        for word in words:
            if word in lexicon.SPECIAL_TOKENS and word != lexicon.UNK:
                rewards.append(0.0)
                continue
            reward = self.token
            if opinion := self._opinion(word):
                reward += opinion * sign * degree * weight
                weight *= self.later
            elif word in lexicon.INSULTS:
                reward += self.insult
            elif word == lexicon.FULL_STOP and not stopped:
                reward += self.finished
                stopped = True
            rewards.append(reward)

            if opinion or word in lexicon.NEUTRAL or word in lexicon.CLAUSE_ENDS:
                sign, degree = 1.0, 1.0
            elif word in lexicon.NEGATIONS:
                sign = -sign
            elif word in lexicon.INTENSIFIERS:
                degree = self.intensifier
            elif word in lexicon.DIMINISHERS:
                degree = self.diminisher
        return rewards

    def gold_reward(self, text: str | Sequence[str]) -> float:
        """The sum of `token_rewards`: 0 for an empty text."""
        return math.fsum(self.token_rewards(text))

    def _opinion(self, word: str) -> float:
        size = self.mild if word in _MILD else self.strong
        return size if word in _GOOD else -size if word in _BAD else 0.0
