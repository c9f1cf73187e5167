"""The grammar of the review world: its productions and their probabilities."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

from tokenratio.data.worlds import review_lexicon as lexicon
from tokenratio.data.worlds.grammar import Production, Stack, Symbol
from tokenratio.data.worlds.review_lexicon import EOS, words_of
from tokenratio.errors import TokenRatioError

_MildStrong: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]
# Probability, words, mood.
_Opinion: TypeAlias = tuple[float, tuple[str, ...], int]


class State(NamedTuple):
    """A nonterminal, with all that the rest of the review still depends on.

    Attributes:
        name: the production's name, as in docs/review-world.md.
        topic: a key of `review_lexicon.SUBJECTS`.
        clause: 1 for the review's first clause.
        mood: sign of the opinion to be expected next, 0 for neither.
        sign: −1 after a negation within the clause, else 1.
    """

    name: str
    topic: str
    clause: int = 1
    mood: int = 0
    sign: int = 1

    def to(self, name: str, **changes: Any) -> "State":
        return self._replace(name=name, **changes)


@dataclass(frozen=True)
class ReviewGrammar:
    """The probabilities of docs/review-world.md; the words are those of `review_lexicon`.

    Attributes:
        num_clauses: probability of one, two, … clauses.
        opener: of a filler before the first clause.
        experience, scorn: of the clause's kind ("i loved the pool", "only a fool would choose the
            pool"); otherwise it is a statement ("the pool was good").
        person: of a statement judging a person rather than an aspect.
        person_insult: of an insult where a person is judged ("the waiter was a clown").
        negation: of "not" or "never" before an adjective, "never" before a verb.
        intensifier, diminisher: of one before an adjective; a verb takes only intensifiers.
        neutral: of a neutral adjective.
        strong: of a strong word where an opinion is expressed.
        agreement: of an opinion that has the sign of the mood.
        connectives: of each of "and" (keeps the mood), "but" (reverses it), "while" (forgets it).
    """

    num_clauses: tuple[float, ...] = (0.3, 0.35, 0.22, 0.13)
    opener: float = 0.3
    experience: float = 0.22
    scorn: float = 0.08
    person: float = 0.25
    person_insult: float = 0.35
    negation: float = 0.2
    intensifier: float = 0.25
    diminisher: float = 0.15
    neutral: float = 0.15
    strong: float = 0.35
    agreement: float = 0.75
    connectives: tuple[float, float, float] = (0.5, 0.3, 0.2)

    def start(self, prompt: str) -> Stack:
        """The stack after a prompt: a review of its topic, then EOS."""
        return (State("Review", topic_of(prompt)), EOS)

    def productions(self, symbol: Symbol) -> Iterable[Production]:
        """The productions of one nonterminal; the probabilities sum to 1."""
        assert isinstance(symbol, State)
        productions = getattr(self, f"_{symbol.name.lower()}")
        return cast(Iterable[Production], productions(symbol))

    def _review(self, state: State) -> Iterable[Production]:
        clause = state.to("Clause")
        yield 1 - self.opener, (clause,)
        for prob, opener in _evenly(self.opener, lexicon.OPENERS):
            yield prob, (*words_of(opener), clause)

    def _clause(self, state: State) -> Iterable[Production]:
        yield 1 - self.experience - self.scorn, ("the", state.to("Statement"))
        for prob, speaker in _evenly(self.experience, lexicon.SPEAKERS):
            yield prob, (speaker, state.to("Experience"))
        yield self.scorn, ("only", "a", state.to("Scorn"))

    def _statement(self, state: State) -> Iterable[Production]:
        aspects, people = lexicon.ASPECTS[state.topic], lexicon.PEOPLE[state.topic]
        copula = state.to("Copula")
        for prob, aspect in _evenly(1 - self.person, aspects):
            yield prob, (aspect, copula, state.to("Predicate"))
        for prob, person in _evenly(self.person, people):
            yield prob, (person, copula, state.to("Verdict"))

    def _copula(self, state: State) -> Iterable[Production]:
        return _one_of(lexicon.COPULAS)

    def _verdict(self, state: State) -> Iterable[Production]:
        yield 1 - self.person_insult, (state.to("Predicate"),)
        yield self.person_insult, ("a", state.to("Insult"), state.to("Rest", mood=-1))

    def _predicate(self, state: State) -> Iterable[Production]:
        yield 1 - self.negation, (state.to("Degree"),)
        yield from _before(state.to("Degree", sign=-1), self.negation, lexicon.NEGATIONS)

    def _degree(self, state: State) -> Iterable[Production]:
        adjective = state.to("Adjective")
        yield 1 - self.intensifier - self.diminisher, (adjective,)
        yield from _before(adjective, self.intensifier, lexicon.INTENSIFIERS)
        yield from _before(adjective, self.diminisher, lexicon.DIMINISHERS)

    def _adjective(self, state: State) -> Iterable[Production]:
        yield from _before(state.to("Rest", sign=1), self.neutral, lexicon.NEUTRAL)
        for prob, words, mood in self._opinions(
            state, (lexicon.MILD_GOOD, lexicon.STRONG_GOOD), (lexicon.MILD_BAD, lexicon.STRONG_BAD)
        ):
            rest = state.to("Rest", mood=mood, sign=1)
            yield from _before(rest, (1 - self.neutral) * prob, words)

    def _experience(self, state: State) -> Iterable[Production]:
        yield 1 - self.negation, (state.to("Manner"),)
        yield from _before(state.to("Manner", sign=-1), self.negation, lexicon.VERB_NEGATIONS)

    def _manner(self, state: State) -> Iterable[Production]:
        yield 1 - self.intensifier, (state.to("Verb"),)
        yield from _before(state.to("Verb"), self.intensifier, lexicon.VERB_INTENSIFIERS)

    def _verb(self, state: State) -> Iterable[Production]:
        for prob, words, mood in self._opinions(
            state,
            (lexicon.MILD_LIKE, lexicon.STRONG_LIKE),
            (lexicon.MILD_DISLIKE, lexicon.STRONG_DISLIKE),
        ):
            for each, word in _evenly(prob, words):
                yield each, (word, "the", state.to("Object"), state.to("Rest", mood=mood, sign=1))

    def _object(self, state: State) -> Iterable[Production]:
        return _one_of(lexicon.ASPECTS[state.topic])

    def _scorn(self, state: State) -> Iterable[Production]:
        scorn = words_of(lexicon.SCORN)
        yield 1.0, (state.to("Insult"), *scorn, state.to("Object"), state.to("Rest", mood=-1))

    def _insult(self, state: State) -> Iterable[Production]:
        return _one_of(lexicon.INSULTS)

    def _rest(self, state: State) -> Iterable[Production]:
        still_possible = self.num_clauses[state.clause - 1 :]
        stop = still_possible[0] / sum(still_possible)
        yield stop, (lexicon.FULL_STOP,)
        moods = (state.mood, -state.mood, 0)
        for word, prob, mood in zip(lexicon.CONNECTIVES, self.connectives, moods, strict=True):
            following = state.to("Clause", clause=state.clause + 1, mood=mood)
            yield (1 - stop) * prob, (word, following)

    def _opinions(self, state: State, good: _MildStrong, bad: _MildStrong) -> Iterator[_Opinion]:
        """Each class of words with its probability, by the mood wanted, and the mood it makes."""
        wanted = state.mood * state.sign
        prob = 0.5 if wanted == 0 else self.agreement if wanted > 0 else 1 - self.agreement
        for side, (mild, strong), mood in ((prob, good, state.sign), (1 - prob, bad, -state.sign)):
            yield side * (1 - self.strong), mild, mood
            yield side * self.strong, strong, mood


def _evenly(prob: float, words: Iterable[str]) -> list[tuple[float, str]]:
    words = tuple(words)
    return [(prob / len(words), word) for word in words]


def _before(symbol: State, prob: float, words: Iterable[str]) -> list[Production]:
    return [(each, (word, symbol)) for each, word in _evenly(prob, words)]


def _one_of(words: Iterable[str]) -> list[Production]:
    return [(prob, (word,)) for prob, word in _evenly(1.0, words)]


_TOPICS = {subject: topic for topic, subjects in lexicon.SUBJECTS.items() for subject in subjects}


def topic_of(prompt: str) -> str:
    """The topic of a prompt: that of the first subject it names."""
    for word in words_of(prompt):
        if word in _TOPICS:
            return _TOPICS[word]
    raise TokenRatioError(
        f"the review world has no topic for the prompt {prompt!r}: "
        f"it must name one of {', '.join(_TOPICS)}"
    )


def all_prompts() -> list[str]:
    """Every prompt of the world, in a fixed order."""
    parts = itertools.product(
        lexicon.FORMS, ("the",), lexicon.QUALITIES, _TOPICS, lexicon.AUDIENCES, (":",)
    )
    return [" ".join(part for part in prompt if part) for prompt in parts]
