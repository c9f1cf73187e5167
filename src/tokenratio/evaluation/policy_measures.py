"""From generations, judgements, held-out pairs and logs to measures."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tokenratio.data import PreparedData
from tokenratio.data.template import TemplateSettings
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.credit import Credit, StateTerm, token_credit, token_scores
from tokenratio.evaluation.distance import kl_policy_ref
from tokenratio.evaluation.diversity import (
    Diversity,
    distinct_in_response,
    predictive_entropy,
    self_bleu,
    vendi_score,
)
from tokenratio.evaluation.held_out_pairs import held_out_pairs, shares_won
from tokenratio.evaluation.length_control import length_controlled_win_rate
from tokenratio.evaluation.response_files import AnsweredPrompt
from tokenratio.evaluation.results import Measure, Value, measure_of
from tokenratio.evaluation.stability import read_metrics, stability
from tokenratio.evaluation.suite import run_suite
from tokenratio.evaluation.verdict_files import Judgement
from tokenratio.models.generation import encode_prompts
from tokenratio.models.response import Response
from tokenratio.models.token_rows import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tokenratio.data.worlds import ResponseMeasure, World


def measure_responses(generations: Sequence[AnsweredPrompt]) -> list[Measure]:
    """Length, the share that was cut, and the diversity of several samples per prompt.

    docs/method.md §8.
    """
    measures = [
        _per_response("length/words", generations, lambda s: len(s.text.split()), unit="words"),
        _per_response("cut", generations, lambda s: s.finish_reason == "length", unit="share"),
    ]
    if all(s.token_ids is not None for g in generations for s in g.samples):
        tokens = _per_response(
            "length/tokens", generations, lambda s: len(s.token_ids or ()), unit="tokens"
        )
        measures.insert(0, tokens)
    texts = [[sample.text for sample in generation.samples] for generation in generations]
    for n in (1, 2):
        distinct = distinct_in_response(texts, n)
        measures.append(_diversity(f"diversity/distinct_{n}", distinct, generations, "higher"))
    if all(len(samples) > 1 for samples in texts):
        measures.append(
            _diversity("diversity/self_bleu", self_bleu(texts), generations, "lower", "BLEU")
        )
        measures.append(
            _diversity("diversity/vendi", vendi_score(texts), generations, "higher", "texts")
        )
    return measures


def measure_world(generations: Sequence[AnsweredPrompt], world: "World") -> list[Measure]:
    """The gold reward and the world's other measures of a response."""
    measures = [
        _per_response(
            "gold_reward", generations, lambda s: world.gold_reward(s.text), better="higher"
        )
    ]
    return measures + [
        _world_measure(measure, generations) for measure in world.response_measures()
    ]


def _world_measure(measure: "ResponseMeasure", generations: Sequence[AnsweredPrompt]) -> Measure:
    return _per_response(
        measure.name,
        generations,
        lambda sample: measure.of(sample.text),
        unit=measure.unit,
        better=measure.better,
    )


def measure_policy(
    model: nn.Module,
    ref_model: nn.Module | None,
    tokenizer: "PreTrainedTokenizerBase",
    generations: Sequence[AnsweredPrompt],
    *,
    is_own_distribution: bool,
    max_prompt_length: int | None = None,
    template: TemplateSettings | None = None,
    batch_size: int,
) -> list[Measure]:
    """Entropy at the samples' states, and with a reference the KL to it.

    Args:
        is_own_distribution: the samples were drawn at temperature 1 with all tokens kept; else the
            KL would not be the policy's, and is left out.
        max_prompt_length: at which their prompts were cut, in tokens.
        template: settings of the chat template.
    """
    samples = _with_prompts(tokenizer, generations, max_prompt_length, template)
    entropy = predictive_entropy(model, samples, batch_size=batch_size)
    measures = [_diversity("diversity/entropy", entropy, generations, "higher", "nats per token")]
    if ref_model is not None and is_own_distribution:
        rows = [sample for group in samples for sample in group]
        kl = iter(kl_policy_ref(model, ref_model, rows, batch_size=batch_size))
        measures.append(
            measure_of(
                "kl_policy_ref",
                [(g.id, i, next(kl)) for g in generations for i in range(len(g.samples))],
                unit="nats per response",
            )
        )
    return measures


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
    places = [(judgement.id, judgement.sample) for judgement in judgements]
    prompts = [judgement.id for judgement in judgements]
    wins: list[Value] = [
        (*place, judgement.outcome) for place, judgement in zip(places, judgements, strict=True)
    ]
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
            prompts,
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
    flips: list[Value] = [
        (*place, float(judgement.flipped))
        for place, judgement in zip(places, judgements, strict=True)
        if judgement.flipped is not None
    ]
    if order_matters:
        measures.append(measure_of(f"position_flips/{judge}", flips, unit="share"))
    unparsed = [
        (*place, float(j.probability is None)) for place, j in zip(places, judgements, strict=True)
    ]
    measures.append(measure_of(f"not_judged/{judge}", unparsed, unit="share"))
    return measures


def measure_pairs(
    model: nn.Module,
    ref_model: nn.Module | None,
    data: PreparedData,
    *,
    beta: float,
    subsets: Sequence[str] | None = None,
    batch_size: int,
) -> list[Measure]:
    """Accuracy and margin of the implicit reward β Σρ on held-out pairs.

    Overall, by subset and by length difference, with what "longer wins" would score beside it.
    """
    rows, sides = list(data.dataset), ("chosen", "rejected")
    samples = [
        TokenRow(tuple(row["prompt_ids"]), tuple(row[f"{side}_ids"]))
        for side in sides
        for row in rows
    ]
    scores = token_scores(
        model, ref_model, samples, beta=beta, state_term="none", batch_size=batch_size
    )
    rewards = [float(score.sum()) for score in scores]
    chosen, rejected = rewards[: len(rows)], rewards[len(rows) :]
    lengths = [[len(row[f"{side}_ids"]) for row in rows] for side in sides]
    prompts = [str(row["prompt_ids"]) for row in rows]
    report = held_out_pairs(chosen, rejected, *lengths, subsets=subsets, prompts=prompts)
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    places = _places(prompts, [row["origin"] for row in rows])
    accuracy = [
        (*p, correct) for p, correct in zip(places, shares_won(margins).tolist(), strict=True)
    ]
    margin = [(*p, m) for p, m in zip(places, margins, strict=True)]
    overall = report.overall
    measures = [
        measure_of("pairs/accuracy", accuracy, unit="share", better="higher"),
        _estimate("pairs/longer_wins", overall.longer_wins, "share"),
        _estimate(f"pairs/over_{overall.better_rule}_wins", overall.over_length, "share", "higher"),
        measure_of("pairs/margin", margin, better="higher"),
    ]
    for name, scores_of in report.by_subset.items():
        measures.append(_estimate(f"pairs/accuracy, {name}", scores_of.accuracy, "share", "higher"))
    for length_bin in report.by_length:
        name = f"pairs/accuracy, chosen longer by {length_bin.shortest:g} to {length_bin.longest:g}"
        measures.append(_estimate(name, length_bin.scores.accuracy, "share", "higher"))
    return measures


def measure_credit(
    model: nn.Module,
    ref_model: nn.Module | None,
    tokenizer: "PreTrainedTokenizerBase",
    data: PreparedData,
    *,
    world: "World",
    beta: float,
    state_terms: Iterable[StateTerm],
    baseline: Callable[..., Any] | None,
    batch_size: int,
) -> list[Measure]:
    """Rank correlation of β·log-ratio (+ state term) with the world's true advantage."""
    measures = []
    for term in state_terms:
        found = token_credit(
            model,
            ref_model,
            tokenizer,
            data.dataset,
            world=world,
            beta=beta,
            state_term=term,
            baseline=baseline if term == "baseline" else None,
            target="action_value" if term == "baseline" else "advantage",
            batch_size=batch_size,
        )
        measures += _credit_measures(found, {"none": "log_ratio"}.get(term, f"log_ratio+{term}"))
    return measures


def measure_suite(
    model: str, suite: str, *, policy: "PreTrainedModel", output: Path, batch_size: int
) -> list[Measure]:
    """General ability, by EleutherAI's harness; see `run_suite`."""
    found = run_suite(model, suite, policy=policy, output=output, batch_size=batch_size)
    figures = [
        (f"{s.task} ({s.shots}-shot {s.metric})", s.value, s.stderr, s.n) for s in found.scores
    ]
    figures.append(("mean", found.mean, found.stderr, sum(s.n for s in found.scores)))
    return [
        Measure(f"suite/{name}", value, math.nan if error is None else error, n, "share", "higher")
        for name, value, error, n in figures
    ]


def measure_log(folder: Path) -> tuple[list[Measure], list[str]]:
    """Stability of the run in a folder, as measures and as sentences."""
    found = stability(read_metrics(folder))
    steps = int(found.values["steps"])
    figures = {name: value for name, value in found.values.items() if name != "steps"}
    return (
        [Measure(f"stability/{name}", value, math.nan, steps) for name, value in figures.items()],
        found.sentences,
    )


def _per_response(
    name: str,
    generations: Sequence[AnsweredPrompt],
    value: Callable[[Response], float],
    **kind: Any,
) -> Measure:
    values: list[Value] = [
        (generation.id, index, float(value(sample)))
        for generation in generations
        for index, sample in enumerate(generation.samples)
    ]
    return measure_of(name, values, **kind)


def _diversity(
    name: str,
    diversity: Diversity,
    generations: Sequence[AnsweredPrompt],
    better: Any,
    unit: str = "",
) -> Measure:
    """A measure with one value per prompt."""
    of_prompt = zip(generations, diversity.per_prompt, strict=True)
    return measure_of(name, [(g.id, 0, value) for g, value in of_prompt], unit=unit, better=better)


def _credit_measures(found: Credit, name: str) -> list[Measure]:
    figures = {"spearman": found.spearman, "spearman_within": found.spearman_within}
    figures |= {"kendall": found.kendall}
    return [
        Measure(
            f"credit/{name}/{kind}",
            correlation.value,
            correlation.standard_error,
            found.num_tokens,
            "",
            "higher",
        )
        for kind, correlation in figures.items()
    ]


def _places(prompts: Sequence[str], origins: Sequence[str]) -> list[tuple[str, int]]:
    """For each row the first origin of its prompt, and its number among the rows of that prompt.

    >>> _places(["ash", "bay", "ash"], ["a:1", "a:2", "a:3"])
    [('a:1', 0), ('a:2', 0), ('a:1', 1)]
    """
    names: dict[str, str] = {}
    seen: Counter[str] = Counter()
    places = []
    for prompt, origin in zip(prompts, origins, strict=True):
        places.append((names.setdefault(prompt, origin), seen[prompt]))
        seen[prompt] += 1
    return places


def _estimate(name: str, estimate: Any, unit: str = "", better: Any = None) -> Measure:
    return Measure(name, estimate.mean, estimate.standard_error, estimate.num, unit, better)


def _with_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    generations: Sequence[AnsweredPrompt],
    max_prompt_length: int | None,
    template: TemplateSettings | None,
) -> list[list[TokenRow]]:
    prompts = encode_prompts(
        tokenizer,
        [generation.prompt for generation in generations],
        template=template,
        max_prompt_length=max_prompt_length,
    )
    samples = []
    for generation, prompt_ids in zip(generations, prompts, strict=True):
        if any(sample.token_ids is None for sample in generation.samples):
            raise TokenRatioError(
                f"{generation.id}: a response without token_ids cannot be scored again"
            )
        samples.append([TokenRow(prompt_ids, tuple(s.token_ids or ())) for s in generation.samples])
    return samples
