"""Win rates of one judge: as measures, as figures for a file, as lines for the terminal."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.length_control import (
    LengthControlledWinRate,
    length_controlled_win_rate,
)
from tokenratio.evaluation.results import Measure, float_of, measure_of, without_nan
from tokenratio.evaluation.verdict_files import Judgement
from tokenratio.evaluation.win_rate import win_rate


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
    wins = [(j.id, j.sample, j.outcome) for j in judgements]
    measures = [measure_of(f"win_rate/{judge}", wins, unit="share", better="higher")]
    outcomes = [outcome for _, _, outcome in measures[0].values]
    num = len(outcomes)
    for name, worth in (("win", 1.0), ("tie", 0.5), ("lose", 0.0)):
        share = outcomes.count(worth) / num if outcomes else math.nan
        measures.append(Measure(f"{name}/{judge}", share, math.nan, num, "share"))
    name = f"lc_win_rate/{judge}"
    try:
        found = _at_equal_length(judgements, [judgement.id for judgement in judgements])
        rate, error, num = found.win_rate, found.standard_error, found.num_comparisons
        measures.append(Measure(name, rate, error, num, "share", "higher"))
    except TokenRatioError as problem:
        report(f"no {name}: {problem}")
    if order_matters:
        flips = [(j.id, j.sample, float(j.flipped)) for j in judgements if j.flipped is not None]
        measures.append(measure_of(f"position_flips/{judge}", flips, unit="share"))
    unparsed = [(j.id, j.sample, float(j.probability is None)) for j in judgements]
    measures.append(measure_of(f"not_judged/{judge}", unparsed, unit="share"))
    return measures


def summarize(
    judgements: Sequence[Judgement],
    *,
    prompts: Sequence[str] | None = None,
    order_matters: bool,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures, A being ours, as JSON: shares in [0, 1], null for a missing figure.

    Lengths are over all comparisons, the rest over those with a full verdict; the others are
    counted.

    Args:
        prompts: identifies each judgement's prompt; default: its id. Judgements of one prompt are
            not independent.
        order_matters: whether the judge was asked in both orders; otherwise there is no flip rate.
        seed: of the interval.
    Raises:
        TokenRatioError: no comparison has a full verdict.
    """
    prompts = [judgement.id for judgement in judgements] if prompts is None else list(prompts)
    rate = asdict(
        win_rate(
            [float_of(judgement.prob_a_first) for judgement in judgements],
            [float_of(judgement.prob_a_second) for judgement in judgements],
            prompts,
            seed=seed,
        )
    )
    if not order_matters:
        rate["flip_rate"] = None
    try:
        controlled = asdict(_at_equal_length(judgements, prompts))
    except TokenRatioError as error:  # the other figures are still valid
        controlled = {"win_rate": None, "reason": str(error)}
    reasons = Counter(reason for judgement in judgements for reason in judgement.reasons)
    summary = {
        "win_rate": rate,
        "length_controlled": controlled,
        "unparsed": {
            "verdicts": sum(judgement.unparsed for judgement in judgements),
            "comparisons": sum(judgement.probability is None for judgement in judgements),
            "reasons": dict(reasons.most_common()),
        },
        "mean_length": {
            name: {
                unit: fmean(getattr(judgement, f"{unit}_{side}") for judgement in judgements)
                for unit in ("words", "characters")
            }
            for name, side in (("ours", "a"), ("theirs", "b"))
        },
    }
    shown: dict[str, Any] = without_nan(summary)
    return shown


def describe_summary(summary: Mapping[str, Any]) -> str:
    """The figures in a few lines; shares in percent, ± one standard error."""
    rate, controlled = summary["win_rate"], summary["length_controlled"]
    unparsed, length = summary["unparsed"], summary["mean_length"]
    lines = [
        f"{summary['ours']} against {summary['theirs']}, judge {summary['judge']}: "
        f"{rate['num_comparisons']} comparisons of {rate['num_prompts']} prompts",
        " / ".join(f"{name} {100 * rate[name]:.1f} %" for name in ("win", "tie", "lose")),
        f"win rate {_estimate(rate)}",
        f"length-controlled win rate {_estimate(controlled)}"
        if controlled["win_rate"] is not None
        else f"no length-controlled win rate: {controlled['reason']}",
        f"mean length {length['ours']['words']:.1f} words against {length['theirs']['words']:.1f} "
        f"({length['ours']['characters']:.1f} characters against "
        f"{length['theirs']['characters']:.1f})",
        f"verdicts missing: {unparsed['verdicts']}; comparisons left out: "
        f"{unparsed['comparisons']}",
    ]
    if rate["flip_rate"] is not None:
        lines.insert(3, f"position flips {100 * rate['flip_rate']:.1f} %")
    return "\n".join(lines)


def _at_equal_length(
    judgements: Sequence[Judgement], prompts: Sequence[str]
) -> LengthControlledWinRate:
    return length_controlled_win_rate(
        [judgement.outcome for judgement in judgements],
        [judgement.characters_a for judgement in judgements],
        [judgement.characters_b for judgement in judgements],
        prompts,
    )


def _estimate(figure: Mapping[str, Any]) -> str:
    share = f"{100 * figure['win_rate']:.1f}"
    if figure["standard_error"] is None:
        return f"{share} % (one prompt: no standard error)"
    low, high = (100 * end for end in figure["interval"])
    error = 100 * figure["standard_error"]
    return f"{share} ± {error:.1f} % (95 % interval {low:.1f} to {high:.1f})"
