"""The grammar of the review world: its productions and their probabilities."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenratio.data.worlds import review_lexicon as lexicon
from tokenratio.data.worlds.grammar import Production, Stack, Symbol
from tokenratio.data.worlds.review_lexicon import EOS, words_of
from tokenratio.errors import TokenRatioError


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
        """What is to be said after a prompt: a review of its topic, then EOS."""
        return (State("Review", topic_of(prompt)), EOS)

    def productions(self, symbol: Symbol) -> Iterable[Production]:
        """The productions of one nonterminal; the probabilities sum to 1."""
        assert isinstance(symbol, State)
        productions: Callable[[State], Iterable[Production]] = getattr(
            self, f"_{symbol.name.lower()}"
        )
        return productions(symbol)

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
        for prob, copula in _evenly(1.0, lexicon.COPULAS):
            yield prob, (copula,)

    def _verdict(self, state: State) -> Iterable[Production]:
        yield 1 - self.person_insult, (state.to("Predicate"),)
        yield self.person_insult, ("a", state.to("Insult"), state.to("Rest", mood=-1))

    def _predicate(self, state: State) -> Iterable[Production]:
        yield 1 - self.negation, (state.to("Degree"),)
        for prob, negation in _evenly(self.negation, lexicon.NEGATIONS):
            yield prob, (negation, state.to("Degree", sign=-1))

    def _degree(self, state: State) -> Iterable[Production]:
        adjective = state.to("Adjective")
        yield 1 - self.intensifier - self.diminisher, (adjective,)
        for prob, word in _evenly(self.intensifier, lexicon.INTENSIFIERS):
            yield prob, (word, adjective)
        for prob, word in _evenly(self.diminisher, lexicon.DIMINISHERS):
            yield prob, (word, adjective)

    def _adjective(self, state: State) -> Iterable[Production]:
        for prob, word in _evenly(self.neutral, lexicon.NEUTRAL):
            yield prob, (word, state.to("Rest", sign=1))
        good, bad = self._opinion_probs(state)
        for prob, words, mood in (
            (good * (1 - self.strong), lexicon.MILD_GOOD, state.sign),
            (good * self.strong, lexicon.STRONG_GOOD, state.sign),
            (bad * (1 - self.strong), lexicon.MILD_BAD, -state.sign),
            (bad * self.strong, lexicon.STRONG_BAD, -state.sign),
        ):
            for each, word in _evenly((1 - self.neutral) * prob, words):
                yield each, (word, state.to("Rest", mood=mood, sign=1))

    def _experience(self, state: State) -> Iterable[Production]:
        yield 1 - self.negation, (state.to("Manner"),)
        for prob, negation in _evenly(self.negation, lexicon.VERB_NEGATIONS):
            yield prob, (negation, state.to("Manner", sign=-1))

    def _manner(self, state: State) -> Iterable[Production]:
        yield 1 - self.intensifier, (state.to("Verb"),)
        for prob, word in _evenly(self.intensifier, lexicon.VERB_INTENSIFIERS):
            yield prob, (word, state.to("Verb"))

    def _verb(self, state: State) -> Iterable[Production]:
        good, bad = self._opinion_probs(state)
        for prob, words, mood in (
            (good * (1 - self.strong), lexicon.MILD_LIKE, state.sign),
            (good * self.strong, lexicon.STRONG_LIKE, state.sign),
            (bad * (1 - self.strong), lexicon.MILD_DISLIKE, -state.sign),
            (bad * self.strong, lexicon.STRONG_DISLIKE, -state.sign),
        ):
            for each, word in _evenly(prob, words):
                yield each, (word, "the", state.to("Object"), state.to("Rest", mood=mood, sign=1))

    def _object(self, state: State) -> Iterable[Production]:
        for prob, aspect in _evenly(1.0, lexicon.ASPECTS[state.topic]):
            yield prob, (aspect,)

    def _scorn(self, state: State) -> Iterable[Production]:
        scorn = words_of(lexicon.SCORN)
        yield 1.0, (state.to("Insult"), *scorn, state.to("Object"), state.to("Rest", mood=-1))

    def _insult(self, state: State) -> Iterable[Production]:
        for prob, insult in _evenly(1.0, lexicon.INSULTS):
            yield prob, (insult,)

    def _rest(self, state: State) -> Iterable[Production]:
        still_possible = self.num_clauses[state.clause - 1 :]
        stop = still_possible[0] / sum(still_possible)
        yield stop, (lexicon.FULL_STOP,)
        moods = (state.mood, -state.mood, 0)
        for word, prob, mood in zip(lexicon.CONNECTIVES, self.connectives, moods, strict=True):
            following = state.to("Clause", clause=state.clause + 1, mood=mood)
            yield (1 - stop) * prob, (word, following)

    def _opinion_probs(self, state: State) -> tuple[float, float]:
        """Probabilities of a good and of a bad word, so that with the sign the mood is met."""
        wanted = state.mood * state.sign
        good = 0.5 if wanted == 0 else self.agreement if wanted > 0 else 1 - self.agreement
        return good, 1 - good


def _evenly(prob: float, words: Iterable[str]) -> list[tuple[float, str]]:
    words = tuple(words)
    return [(prob / len(words), word) for word in words]


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
