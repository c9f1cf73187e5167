"""The sentiment world: everyday prompts, any chat model's answers, VADER's sentiment as reward.

Described in docs/sentiment-world.md.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from tokenratio.data.worlds.drawing import draw_prompts
from tokenratio.data.worlds.pairs import WorldPrompt
from tokenratio.data.worlds.protocol import Split, WordValue, World
from tokenratio.data.worlds.sentiment_prompts import prompts_by_split
from tokenratio.data.worlds.vader import analyzer, word_valences

# VADER's own constant, which maps sums of valences to its `compound` score.
_ALPHA = 15.0


@dataclass(frozen=True)
class SentimentWorld(World):
    """Prompts and reward of the sentiment world.

    Attributes:
        scale: the largest possible reward, in units of the labels' temperature 1.
    """

    scale: float = 4.0

    name: ClassVar[str] = "sentiment"
    has_responses: ClassVar[bool] = False

    @cached_property
    def _splits(self) -> dict[str, list[str]]:
        return prompts_by_split()

    def prompts(
        self, num: int, *, seed: int, split: Split = "train", **own: str
    ) -> list[WorldPrompt]:
        """Draw prompts of one split; train and test share no topic.

        Up to 576 (train) or 144 (test) are distinct; the first k are the same for every `num`.
        """
        drawn = draw_prompts(self._splits, num, seed=seed, split=split, world=self.name)
        return [[{"role": "user", "content": text}] for text in drawn]

    def require(self) -> None:
        """Raise `TokenRatioError` if `vaderSentiment` is missing."""
        analyzer()

    def gold_reward(self, text: str) -> float:
        """`scale` · s / √(s² + 15), s the sum of the valences of the text's words; 0 if empty.

        This is VADER's compound score without its emphasis for "!" and "?", in [−scale, scale].
        """
        total = math.fsum(word.value for word in word_valences(text))
        return self.scale * total / math.sqrt(total * total + _ALPHA)

    def word_values(self, text: str) -> list[WordValue]:
        """What each word contributes to `gold_reward`: its valence, scaled so that they sum to it.

        The scale depends on the whole text, so that words of different texts are comparable only
        by sign.
        """
        words = word_valences(text)
        total = math.fsum(word.value for word in words)
        scale = self.scale / math.sqrt(total * total + _ALPHA)
        return [WordValue(word.start, word.end, scale * word.value) for word in words]
