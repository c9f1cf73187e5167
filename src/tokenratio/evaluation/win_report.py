"""Win rates of one judge as a report: figures for a file, lines for the terminal."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.length_control import length_controlled_win_rate
from tokenratio.evaluation.verdict_files import Judgement
from tokenratio.evaluation.win_rate import win_rate


def summarize(
    judgements: Sequence[Judgement],
    *,
    prompts: Sequence[str] | None = None,
    order_matters: bool,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures, ours being A, as JSON: shares in [0, 1], null where there is no figure.

    Lengths are over all comparisons; those without a full verdict are left out of the rest, and
    counted.

    Args:
        prompts: identifies the prompt of each judgement; by default its id. Two ids may have the
            same prompt, and are then not independent draws.
        order_matters: whether the judge was asked in both orders; otherwise there is no flip rate.
        seed: of the interval.
    Raises:
        TokenRatioError: no comparison has a full verdict.
    """
    prompts = [judgement.id for judgement in judgements] if prompts is None else list(prompts)
    rate = asdict(
        win_rate(
            [_number(judgement.prob_a_first) for judgement in judgements],
            [_number(judgement.prob_a_second) for judgement in judgements],
            prompts,
            seed=seed,
        )
    )
    if not order_matters:
        rate["flip_rate"] = None
    lengths = {
        unit: [[getattr(j, f"{unit}_{side}") for j in judgements] for side in "ab"]
        for unit in ("words", "characters")
    }
    try:
        outcomes = [judgement.outcome for judgement in judgements]
        ours, theirs = lengths["characters"]
        controlled = asdict(length_controlled_win_rate(outcomes, ours, theirs, prompts))
    except TokenRatioError as error:  # the raw figures stand all the same
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
            side: {unit: math.fsum(values[i]) / len(values[i]) for unit, values in lengths.items()}
            for i, side in enumerate(("ours", "theirs"))
        },
    }
    shown: dict[str, Any] = _without_nan(summary)
    return shown


def describe(summary: Mapping[str, Any]) -> str:
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


def _estimate(figure: Mapping[str, Any]) -> str:
    share = f"{100 * figure['win_rate']:.1f}"
    if figure["standard_error"] is None:
        return f"{share} % (one prompt: no standard error)"
    low, high = (100 * end for end in figure["interval"])
    error = 100 * figure["standard_error"]
    return f"{share} ± {error:.1f} % (95 % interval {low:.1f} to {high:.1f})"


def _number(probability: float | None) -> float:
    return math.nan if probability is None else probability


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
