"""The measures that need no model: of responses and a run's log."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenratio.data.worlds import ResponseMeasure, World
from tokenratio.evaluation.diversity import distinct_in_response, self_bleu, vendi_score
from tokenratio.evaluation.response_files import AnsweredPrompt
from tokenratio.evaluation.results import Better, Measure, measure_of
from tokenratio.evaluation.stability import read_metrics, stability
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
