"""The measures that need no model: of responses, judgements and a run's log."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenratio.data.worlds import ResponseMeasure, World
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.diversity import distinct_in_response, self_bleu, vendi_score
from tokenratio.evaluation.length_control import length_controlled_win_rate
from tokenratio.evaluation.response_files import AnsweredPrompt
from tokenratio.evaluation.results import Better, Measure, Value, measure_of
from tokenratio.evaluation.stability import read_metrics, stability
from tokenratio.evaluation.verdict_files import Judgement
from tokenratio.models.response import Response


def measure_responses(generations: Sequence[AnsweredPrompt]) -> list[Measure]:
    """Length, the share that was cut, and the diversity of several samples per prompt.

    docs/method.md §8.
    """
    measures = []
    if all(s.token_ids is not None for g in generations for s in g.samples):
        measures.append(
            _per_response("length/tokens", generations, lambda s: len(s.token_ids or ()), "tokens")
        )
    measures += [
        _per_response("length/words", generations, lambda s: len(s.text.split()), "words"),
        _per_response("cut", generations, lambda s: s.finish_reason == "length", "share"),
    ]
    texts = [[sample.text for sample in generation.samples] for generation in generations]
    for n in (1, 2):
        distinct = distinct_in_response(texts, n)
        measures.append(
            measure_by_prompt(f"diversity/distinct_{n}", distinct, generations, "higher")
        )
    if all(len(samples) > 1 for samples in texts):
        bleu, vendi = self_bleu(texts), vendi_score(texts)
        measures += [
            measure_by_prompt("diversity/self_bleu", bleu, generations, "lower", "BLEU"),
            measure_by_prompt("diversity/vendi", vendi, generations, "higher", "texts"),
        ]
    return measures


def measure_world(generations: Sequence[AnsweredPrompt], world: World) -> list[Measure]:
    """The gold reward and the world's other measures of a response."""

    gold = ResponseMeasure("gold_reward", world.gold_reward, unit="", better="higher")

    def measure(each: ResponseMeasure) -> Measure:
        return _per_response(
            each.name, generations, lambda s: each.of(s.text), each.unit, each.better
        )

    return [measure(each) for each in (gold, *world.response_measures())]


def measure_judgements(
    judgements: Sequence[Judgement],
    judge: str,
    *,
    order_matters: bool,
    report: Callable[[str], None] = print,
) -> list[Measure]:
    """Win rate, win rate at equal length, position flips, and the share that was not judged.

    Args:
        order_matters: whether the judge was asked in both orders.
        report: receives the reason if there is no win rate at equal length.
    """
    wins: list[Value] = [(j.id, j.sample, j.outcome) for j in judgements]
    measures = [measure_of(f"win_rate/{judge}", wins, unit="share", better="higher")]
    outcomes = [outcome for _, _, outcome in measures[0].values]
    for name, worth in (("win", 1.0), ("tie", 0.5), ("lose", 0.0)):
        share = outcomes.count(worth) / len(outcomes) if outcomes else math.nan
        measures.append(Measure(f"{name}/{judge}", share, math.nan, len(outcomes), "share"))
    try:
        controlled = length_controlled_win_rate(
            [outcome for _, _, outcome in wins],
            [judgement.characters_a for judgement in judgements],
            [judgement.characters_b for judgement in judgements],
            [judgement.id for judgement in judgements],
        )
    except TokenRatioError as error:
        report(f"no lc_win_rate/{judge}: {error}")
    else:
        measures.append(
            Measure(
                f"lc_win_rate/{judge}",
                controlled.win_rate,
                controlled.standard_error,
                controlled.num_comparisons,
                "share",
                "higher",
            )
        )
    if order_matters:
        flips = [(j.id, j.sample, float(j.flipped)) for j in judgements if j.flipped is not None]
        measures.append(measure_of(f"position_flips/{judge}", flips, unit="share"))
    unparsed = [(j.id, j.sample, float(j.probability is None)) for j in judgements]
    measures.append(measure_of(f"not_judged/{judge}", unparsed, unit="share"))
    return measures


def measure_log(folder: Path) -> tuple[list[Measure], list[str]]:
    """Stability of the run in a folder, as measures and as sentences."""
    found = stability(read_metrics(folder))
    figures = dict(found.values)
    steps = int(figures.pop("steps"))
    return (
        [Measure(f"stability/{name}", value, math.nan, steps) for name, value in figures.items()],
        found.sentences,
    )


def measure_by_prompt(
    name: str,
    values: Sequence[float],
    generations: Sequence[AnsweredPrompt],
    better: Better,
    unit: str = "",
) -> Measure:
    """A measure with one value per prompt."""
    found = [(g.id, 0, value) for g, value in zip(generations, values, strict=True)]
    return measure_of(name, found, unit=unit, better=better)


def _per_response(
    name: str,
    generations: Sequence[AnsweredPrompt],
    value: Callable[[Response], float],
    unit: str,
    better: Better = None,
) -> Measure:
    values = [
        (generation.id, index, float(value(sample)))
        for generation in generations
        for index, sample in enumerate(generation.samples)
    ]
    return measure_of(name, values, unit=unit, better=better)
