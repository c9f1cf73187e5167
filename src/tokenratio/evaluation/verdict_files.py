"""A judge's verdicts on pairs of responses, in both orders, written to a file and resumed.

`judgements.jsonl` has a line per comparison; `judgements.settings.json` beside it holds the judge
and its settings.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
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
from tokenratio.evaluation.win_rule import flips, outcomes


@dataclass(frozen=True)
class Judgement:
    """A judge's verdicts on a pair of responses, one for each order; a line of the file.

    A judge for which the order cannot matter is asked once; both probabilities are then the same.

    Attributes:
        id, sample: which comparison.
        prob_a_first, prob_a_second: that response A is better, A shown first or second; None where
            there was no verdict.
        probability: their mean; None unless both exist, since one alone reflects the position.
        flipped: whether the preference followed the position: one order prefers A, the other B.
            An even verdict prefers neither. None unless both are there.
        unparsed: orders without a verdict.
        reasons: why, one for each.
        characters_a, characters_b, words_a, words_b: lengths of the responses; words are what
            whitespace separates.
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

    @property
    def outcome(self) -> float:
        """1, 1/2 or 0 by the rule of `outcomes`; nan without a verdict in both orders."""
        return float(outcomes(self.prob_a_first, self.prob_a_second))


def pair_up(ours: Sequence[AnsweredPrompt], theirs: Sequence[AnsweredPrompt]) -> list[ResponsePair]:
    """Every response of ours (A) against theirs (B) to the same prompt.

    Sample i meets sample i; where one side has a single response to a prompt, all of the other's
    meet it.

    Raises:
        TokenRatioError: the prompts are not the same, or the numbers of samples do not match.
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
        for number, (first, second) in enumerate(zip(a, b, strict=True)):
            comparisons.append(
                ResponsePair(generation.id, number, generation.prompt, first, second)
            )
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

    Where the file has no full verdict, answers that the judge keeps are read again: they may be
    readable to this version.

    Args:
        path: the file; what an interrupted run left of it is kept.
        settings: what else distinguishes the verdicts, such as the names of both sides. JSON.
        overwrite: begin the file anew.
        report: receives lines on what was kept and dropped, and on missing verdicts.

    Returns:
        The judgements in the order of the comparisons, as the file then has them.

    Raises:
        TokenRatioError: the file was made from other comparisons or by another judge, another
            process writes it, or the judge gave up: its verdicts until then are in the file.
    """
    path, wanted = Path(path), _by_place(comparisons)
    settings = {**judge.identity(), **(settings or {})}

    def check(judgement: Judgement, origin: str) -> None:
        place = (judgement.id, judgement.sample)
        if place not in wanted or judgement.content != _content(wanted[place]):
            raise TokenRatioError(
                f"{origin}: sample {judgement.sample} of {judgement.id} does not match the "
                "responses compared now: delete the file, or choose another"
            )

    with Journal(
        path,
        settings,
        _LINES,
        num=len(wanted),
        check=check,
        overwrite=overwrite,
        report=report,
    ) as journal:
        reread = _reread(judge, journal.records, wanted, journal.digest)
        if reread:
            report(
                f"{path}: {len(reread)} kept answers without a full verdict could be read this time"
            )
        missing = [pair for place, pair in wanted.items() if place not in journal.records]
        failed: list[tuple[ResponsePair, str]] = []
        with journal.resumable():
            for comparison, verdicts in _ask(judge, missing):
                unasked = [v.reason for v in verdicts if not v.is_final]
                if unasked:
                    failed.append((comparison, str(unasked[0])))
                    continue
                # No wait for the disk: a judge that is paid has a cache that waits.
                journal.add(_judgement(comparison, verdicts, journal.digest), sync=False)
            if failed:
                comparison, reason = failed[0]
                raise TokenRatioError(
                    f"{len(failed)} comparisons could not be judged, first {comparison.id}, sample "
                    f"{comparison.sample}: {reason}"
                )
        judgements = journal.finish(wanted, reread)
    report(describe(judgements, order_matters=judge.order_matters))
    return judgements


def read_judgements(path: str | Path) -> list[Judgement]:
    """The judgements of a finished file, in its order.

    Raises:
        TokenRatioError: it cannot be read; names the line and what is wrong with it.
    """
    judgements = _LINES.read_file(Path(path))
    if not judgements:
        raise TokenRatioError(f"{path} holds no judgements")
    return judgements


def describe(judgements: Sequence[Judgement], *, order_matters: bool = True) -> str:
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


def _by_place(comparisons: Sequence[ResponsePair]) -> dict[tuple[str, int], ResponsePair]:
    places: dict[tuple[str, int], ResponsePair] = {}
    for comparison in comparisons:
        place = (comparison.id, comparison.sample)
        if place in places:
            raise TokenRatioError(f"two comparisons are sample {place[1]} of {place[0]}")
        places[place] = comparison
    if not places:
        raise TokenRatioError("there is nothing to compare")
    return places


def _reread(
    judge: Judge,
    done: Mapping[tuple[str, int], Judgement],
    wanted: Mapping[tuple[str, int], ResponsePair],
    digest: str,
) -> dict[tuple[str, int], Judgement]:
    """Judgements that had no full verdict and have one in the judge's kept answers."""
    found: dict[tuple[str, int], Judgement] = {}
    if not isinstance(judge, KeepsAnswers):
        return found
    for place, judgement in done.items():
        if judgement.probability is not None:
            continue
        comparison = wanted[place]
        verdicts = [judge.recall(each) for each in _orders(judge, comparison)]
        whole = [verdict for verdict in verdicts if verdict is not None]
        if len(whole) == len(verdicts) and all(v.probability is not None for v in whole):
            found[place] = _judgement(comparison, whole, digest)
    return found


def _orders(judge: Judge, comparison: ResponsePair) -> list[ResponsePair]:
    """The comparison in its own order and, where that can matter, swapped."""
    return [comparison, comparison.swapped()] if judge.order_matters else [comparison]


def _ask(
    judge: Judge, comparisons: Sequence[ResponsePair]
) -> Iterator[tuple[ResponsePair, list[Verdict]]]:
    """The verdicts on each comparison, in every order that is asked for."""
    if not comparisons:
        return
    times = 2 if judge.order_matters else 1
    asked = [c for each in comparisons for c in _orders(judge, each)]
    with closing(_counted(judge(asked), len(asked))) as verdicts:
        for comparison in comparisons:
            yield comparison, [next(verdicts) for _ in range(times)]
        for _ in verdicts:
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
    missing = [field.name for field in fields(Judgement) if field.name not in line]
    if missing:
        raise TokenRatioError(f"{origin}: no {missing[0]}: this is not a file of judgements")
    for name in ("prob_a_first", "prob_a_second", "probability"):
        value = line[name]
        if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
            raise TokenRatioError(f"{origin}: {name} is {value!r}, not a probability")
    values = {field.name: line[field.name] for field in fields(Judgement)}
    return Judgement(**values | {"reasons": tuple(values["reasons"])})


_LINES = LineFormat(
    read=_read_judgement,
    write=asdict,
    key=lambda judgement: (judgement.id, judgement.sample),
    items="comparisons",
    done="judged",
)
