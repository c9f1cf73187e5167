import math
import random

import pytest

from tokenratio.data.worlds.grammar import StochasticGrammar

# A → "a" A (1/4) | "b" C (3/4);  C → "c" (1/2) | "d" (1/2)
RULES = {
    ("A",): [(0.25, ("a", ("A",))), (0.75, ("b", ("C",)))],
    ("C",): [(0.5, ("c",)), (0.5, ("d",))],
}
GRAMMAR = StochasticGrammar(RULES.__getitem__)
START = (("A",), ".")


def test_next_words():
    assert GRAMMAR.next_words(START) == {"a": (0.25, START), "b": (0.75, (("C",), "."))}
    assert GRAMMAR.next_words(()) == {}


def test_word_log_probs():
    assert GRAMMAR.word_log_probs(START, ["a", "b", "d", "."]) == pytest.approx(
        [math.log(0.25), math.log(0.75), math.log(0.5), 0.0]
    )
    assert GRAMMAR.word_log_probs(START, ["b", "a", "c"])[1:] == [-math.inf, -math.inf]
    assert GRAMMAR.word_log_probs(("x",), ["x", "x"]) == [0.0, -math.inf]


def test_samples_follow_the_productions():
    rng = random.Random(0)
    samples = [GRAMMAR.sample(START, rng) for _ in range(4000)]
    assert all(sample[-2:] in (["c", "."], ["d", "."]) for sample in samples)
    first = sum(sample[0] == "a" for sample in samples) / len(samples)
    assert first == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))


def test_two_productions_with_one_first_word_are_refused():
    grammar = StochasticGrammar(lambda _: [(0.5, ("a", "b")), (0.5, ("a", "c"))])
    with pytest.raises(ValueError, match="not LL"):
        grammar.next_words((("A",),))
