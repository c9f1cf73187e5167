"""The sentiment of each word of a text, by VADER (Hutto and Gilbert 2014; `vaderSentiment`)."""

import re
import string
from functools import lru_cache
from typing import Any

from tokenratio.data.worlds.protocol import WordValue
from tokenratio.errors import TokenRatioError


@lru_cache(maxsize=1)
def analyzer() -> Any:
    """VADER, except that `polarity_scores` returns the valence of each word.

    Raises:
        TokenRatioError: the package is missing.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise TokenRatioError(
            "world:sentiment needs the package vaderSentiment: pip install 'tokenratio[worlds]'"
        ) from None

    class Valences(SentimentIntensityAnalyzer):  # type: ignore[misc]  # it has no types
        """VADER's last step, which sums and squashes the valences, returns them instead."""

        def score_valence(self, sentiments: list[float], text: str) -> list[float]:
            return [float(valence) for valence in sentiments]

    return Valences()


def word_valences(text: str) -> list[WordValue]:
    """VADER's valence of each word, after negations, boosters, capitals, idioms and "but".

    −4 to 4 in its lexicon, 0 for most words; modifiers can exceed that. Words are those between
    white space, without the punctuation around them; an emoji counts as the words of its name.
    """
    vader = analyzer()
    read, origins = _read(text, vader.emojis)
    words = list(re.finditer(r"\S+", read))
    valences = vader.polarity_scores(text)
    values = []
    for match, valence in zip(words, valences, strict=True):
        word = match.group()
        bare = word.strip(string.punctuation) or word  # "." or ":)" is a word of its own
        first = match.start() + word.index(bare)
        start, end = origins[first], origins[first + len(bare) - 1] + 1
        values.append(WordValue(start, end, valence))
    return values


def _read(text: str, names: dict[str, str]) -> tuple[str, list[int]]:
    """The text as VADER reads it, with the names of emojis; where each character came from."""
    parts: list[str] = []
    origins: list[int] = []
    after_space = True
    for index, char in enumerate(text):
        part = char
        if char in names:
            part = names[char] if after_space else " " + names[char]
        after_space = char == " "
        parts.append(part)
        origins += [index] * len(part)
    return "".join(parts), origins
