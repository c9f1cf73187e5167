"""A stochastic grammar read from left to right: samples, next words, exact log-probabilities.

The grammar is LL(1): no two productions that can apply at one place begin with the same word. So a
prefix has exactly one derivation, the next word's distribution given any prefix is exact and cheap,
and the log-probability of a text is a sum of logarithms along it, without a sum over parses.
"""

import math
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import accumulate

# A word is a str; any other hashable is a nonterminal.
Symbol = Hashable
# The symbols still to be produced, in order; empty at the end.
Stack = tuple[Symbol, ...]
# A probability and the symbols that replace the nonterminal.
Production = tuple[float, Stack]


class StochasticGrammar:
    """A grammar given by `productions(nonterminal)`, whose probabilities sum to 1."""

    def __init__(self, productions: Callable[[Symbol], Iterable[Production]]):
        self._productions = productions
        self._steps: dict[Stack, dict[str, tuple[float, Stack]]] = {}
        self._draws: dict[Stack, tuple[list[str], list[float]]] = {}

    def next_words(self, stack: Stack) -> dict[str, tuple[float, Stack]]:
        """Each possible next word → its probability, and the stack after it."""
        if stack not in self._steps:
            words: dict[str, tuple[float, Stack]] = {}
            for prob, word, rest in self._first_words(stack):
                if word in words:
                    raise ValueError(
                        f"not LL(1): two productions of {stack[0]!r} begin with {word!r}"
                    )
                words[word] = (prob, rest)
            self._steps[stack] = words
        return self._steps[stack]

    def _first_words(self, stack: Stack) -> Iterator[tuple[float, str, Stack]]:
        if not stack:
            return
        first, rest = stack[0], stack[1:]
        if isinstance(first, str):
            yield 1.0, first, rest
            return
        for prob, body in self._productions(first):
            if prob > 0:
                for inner, word, remaining in self._first_words(body + rest):
                    yield prob * inner, word, remaining

    def sample(self, stack: Stack, rng: random.Random) -> list[str]:
        """Draw the words of one text."""
        words = []
        while stack:
            if stack not in self._draws:  # cached: accumulating the weights is most of the work
                following = self.next_words(stack)
                cumulative = accumulate(prob for prob, _ in following.values())
                self._draws[stack] = (list(following), list(cumulative))
            population, cum_weights = self._draws[stack]
            word = rng.choices(population, cum_weights=cum_weights)[0]
            stack = self.next_words(stack)[word][1]
            words.append(word)
        return words

    def word_log_probs(self, stack: Stack, words: Sequence[str]) -> list[float]:
        """log P(word_t | words before it) of each word, in nats; −inf from an impossible one on."""
        log_probs = []
        for word in words:
            prob, stack = self.next_words(stack).get(word, (0.0, ()))
            log_probs.append(math.log(prob) if prob else -math.inf)
        return log_probs
