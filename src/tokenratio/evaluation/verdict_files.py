"""A judge's verdicts on pairs of responses, in both orders, written to a file and resumed.

`judgements.jsonl` has a line per comparison; `judgements.settings.json` beside it holds the judge
and its settings.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.journal import Journal, LineFormat
from tokenratio.evaluation.judges.protocol import (
    Judge,
    KeepsAnswers,
    ResponsePair,
    Verdict,
    digest_of,
)
from tokenratio.evaluation.response_files import AnsweredPrompt
from tokenratio.evaluation.win_rate import flips, outcomes
from tokenratio.records import as_shape


@dataclass(frozen=True)
class Judgement:
    """A judge's verdicts on a pair of responses, one for each order; a line of the file.

    A judge for which the order cannot matter is asked once; both probabilities are then the same.

    Attributes:
        id, sample: which comparison.
        prob_a_first, prob_a_second: that response A is better, A shown first or second; None
            without a verdict.
        probability: their mean; None unless both exist, because one alone reflects the position.
        flipped: whether the preference followed the position: one order prefers A, the other B.
            An even verdict prefers neither. None unless both exist.
        unparsed: orders without a verdict; `reasons`: one for each.
        characters_a, characters_b, words_a, words_b: lengths of the responses; whitespace separates
            words.
        content: digest of prompt and responses.
        settings: digest of judge and settings.
    """

    id: str
    sample: int
    prob_a_first: float | None
    prob_a_second: float | None
    probability: float | None
    flipped: bool | None
    unparsed: int
    reasons: tuple[str, ...]
    characters_a: int
    characters_b: int
    words_a: int
    words_b: int
    content: str
    settings: str

    def __post_init__(self) -> None:
        for name in ("prob_a_first", "prob_a_second", "probability"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise TokenRatioError(f"{name} is {value!r}, not a probability")

    @property
    def outcome(self) -> float:
        """1, 1/2 or 0 by the rule of `outcomes`; nan without a verdict in both orders."""
        return float(outcomes(self.prob_a_first, self.prob_a_second))


def pair_up(ours: Sequence[AnsweredPrompt], theirs: Sequence[AnsweredPrompt]) -> list[ResponsePair]:
    """Every response of ours (A) against theirs (B) to the same prompt.

    Sample i is paired with sample i; a side with a single response pairs it with all of the
    other's. Different prompts or numbers of samples are refused.
    """
    others = {generation.id: generation for generation in theirs}
    unpaired = [g.id for g in ours if g.id not in others]
    unpaired += sorted(others.keys() - {generation.id for generation in ours})
    if unpaired:
        raise TokenRatioError(
            f"{len(unpaired)} of the prompts are answered on one side only, first {unpaired[0]}: "
            "both sides must come from the same prompts"
        )
    comparisons = []
    for generation in ours:
        other = others[generation.id]
        if generation.prompt != other.prompt:
            raise TokenRatioError(f"the two sides have different prompts under id {generation.id}")
        a, b = generation.samples, other.samples
        if len(b) == 1:
            b = b * len(a)
        elif len(a) == 1:
            a = a * len(b)
        if len(a) != len(b):
            raise TokenRatioError(
                f"{generation.id}: {len(a)} samples against {len(b)}; both sides need the same "
                "number, or one side a single sample"
            )
        comparisons += [
            ResponsePair(generation.id, number, generation.prompt, first, second)
            for number, (first, second) in enumerate(zip(a, b, strict=True))
        ]
    return comparisons


def judge_all(
    comparisons: Sequence[ResponsePair],
    judge: Judge,
    path: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> list[Judgement]:
    """Write a judgement of every comparison, asking the judge only for what the file lacks.

    Where the file has no full verdict, the answers that a judge keeps are parsed again, because
    this version may be able to read them.

    Args:
        path: the file; what an interrupted run wrote to it is kept.
        settings: what else distinguishes the verdicts, such as the names of both sides. JSON.
        overwrite: drop the file's present content.
        report: receives lines on what was kept and dropped, and on missing verdicts.
    Returns:
        The judgements in the order of the comparisons, which is then the file's.
    Raises:
        TokenRatioError: the file was made from other comparisons or by another judge, another
            process is writing it, or the judge failed; its verdicts until then are in the file.
    """
    if not comparisons:
        raise TokenRatioError("there is nothing to compare")
    settings = {**judge.identity(), **(settings or {})}
    pairs = [((each.id, each.sample), each) for each in comparisons]
    journal = Journal(path, settings, _LINES, pairs, overwrite=overwrite, report=report)
    with closing(journal):
        reread = _reread(judge, journal)
        if reread:
            report(f"{path}: {len(reread)} missing verdicts were read from stored answers")
        failed: list[tuple[ResponsePair, str]] = []
        with journal.resumable():
            for comparison, verdicts in _ask(judge, list(journal.missing.values())):
                unasked = [v.reason for v in verdicts if not v.is_final]
                if unasked:
                    failed.append((comparison, str(unasked[0])))
                    continue
                # No sync: paid judges have a cache that is written first.
                journal.add(_judgement(comparison, verdicts, journal.digest), sync=False)
            if failed:
                comparison, reason = failed[0]
                raise TokenRatioError(
                    f"{len(failed)} comparisons could not be judged, first {comparison.id}, sample "
                    f"{comparison.sample}: {reason}"
                )
        judgements = journal.finish(reread)
    report(describe_judgements(judgements, order_matters=judge.order_matters))
    return judgements


def read_judgements(path: str | Path) -> list[Judgement]:
    """The judgements of a finished file, in its order.

    Raises:
        TokenRatioError: it cannot be read; names the line and what is wrong with it.
    """
    return _LINES.read_file(path)


def describe_judgements(judgements: Sequence[Judgement], *, order_matters: bool = True) -> str:
    """A line on missing verdicts, the reasons for them, and flips.

    Args:
        order_matters: whether both orders were asked.
    """
    whole = [judgement for judgement in judgements if judgement.probability is not None]
    text = f"{len(judgements)} comparisons, {len(judgements) - len(whole)} without a full verdict"
    reasons = Counter(reason for judgement in judgements for reason in judgement.reasons)
    if reasons:
        text += f" ({', '.join(f'{reason}: {num}' for reason, num in reasons.most_common())})"
    if not order_matters:
        return text
    flips = sum(bool(judgement.flipped) for judgement in whole)
    return f"{text}; the position decided {flips} of {len(whole)}"


def _reread(
    judge: Judge, journal: Journal[tuple[str, int], Judgement]
) -> dict[tuple[str, int], Judgement]:
    """Judgements that had no full verdict and have one in the answers that the judge keeps."""
    found: dict[tuple[str, int], Judgement] = {}
    if not isinstance(judge, KeepsAnswers):
        return found
    for key, judgement in journal.records.items():
        if judgement.probability is None:
            comparison = journal.items[key]
            kept = [judge.recall(each) for each in _orders(judge, comparison)]
            whole = [v for v in kept if v is not None and v.probability is not None]
            if len(whole) == len(kept):
                found[key] = _judgement(comparison, whole, journal.digest)
    return found


def _orders(judge: Judge, comparison: ResponsePair) -> list[ResponsePair]:
    return [comparison, comparison.swapped()] if judge.order_matters else [comparison]


def _ask(
    judge: Judge, comparisons: Sequence[ResponsePair]
) -> Iterator[tuple[ResponsePair, list[Verdict]]]:
    """The verdicts on each comparison, in every order that matters."""
    if not comparisons:
        return
    orders = [_orders(judge, each) for each in comparisons]
    asked = list(chain.from_iterable(orders))
    with closing(_counted(judge(asked), len(asked))) as verdicts:
        for comparison, of_one in zip(comparisons, orders, strict=True):
            yield comparison, [next(verdicts) for _ in of_one]
        for _ in verdicts:  # the judge reports its totals at the end
            pass


def _counted(verdicts: Iterable[Verdict], num: int) -> Generator[Verdict, None, None]:
    given = 0
    for verdict in verdicts:
        given += 1
        yield verdict
    if given != num:
        raise ValueError(f"the judge gave {given} verdicts on {num} comparisons")


def _judgement(comparison: ResponsePair, verdicts: Sequence[Verdict], digest: str) -> Judgement:
    first = verdicts[0].probability
    second = first
    if len(verdicts) == 2:
        second = None if verdicts[1].probability is None else 1 - verdicts[1].probability
    mean = None if first is None or second is None else (first + second) / 2
    return Judgement(
        id=comparison.id,
        sample=comparison.sample,
        prob_a_first=first,
        prob_a_second=second,
        probability=mean,
        flipped=None if mean is None else bool(flips(first, second)),
        unparsed=sum(verdict.probability is None for verdict in verdicts),
        reasons=tuple(v.reason or "no reason given" for v in verdicts if v.probability is None),
        characters_a=len(comparison.response_a.text),
        characters_b=len(comparison.response_b.text),
        words_a=len(comparison.response_a.text.split()),
        words_b=len(comparison.response_b.text.split()),
        content=_content(comparison),
        settings=digest,
    )


def _content(comparison: ResponsePair) -> str:
    return digest_of(comparison.content())[:16]


def _read_judgement(line: Mapping[str, Any], origin: str) -> Judgement:
    return as_shape(Judgement, line, origin, "this is not a file of judgements")


_LINES = LineFormat(
    read=_read_judgement,
    write=asdict,
    key=lambda judgement: (judgement.id, judgement.sample),
    matches=lambda judgement, comparison: judgement.content == _content(comparison),
    records="judgements",
    items="comparisons",
    done="judged",
)
