"""Figures of evaluated policies: reward against distance, and against diversity."""

import math
from collections.abc import Sequence
from typing import Any

from tokenratio.evaluation.estimates import mean_interval
from tokenratio.evaluation.frontier import Frontier, PolicyPoint, frontiers_of
from tokenratio.evaluation.options import REFERENCE
from tokenratio.evaluation.results import Measure, PolicyMeasures
from tokenratio.report.content import Figure, Table
from tokenratio.report.curves import DASHES, PALETTE, SYMBOLS

_DIVERSITIES = ("diversity/entropy", "diversity/vendi", "diversity/distinct_2")


def frontier_figure(policies: Sequence[PolicyMeasures]) -> tuple[Figure, Table] | None:
    """Gold reward over KL with each group's hull, and the areas below; None without both."""
    found = frontiers_of(policies, REFERENCE)
    if found is None:
        return None
    groups, reference, frontiers = found
    measured = {policy.policy: policy for policy in policies}
    traces: list[dict[str, Any]] = []
    for number, (name, points) in enumerate(groups.items()):
        color = PALETTE[number % len(PALETTE)]
        corners = frontiers[name].hull
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{name}: hull",
                "x": [_short(kl) for kl, _ in corners],
                "y": [_short(reward) for _, reward in corners],
                "line": {"color": color, "dash": DASHES[number % len(DASHES)], "width": 2},
                "hoverinfo": "skip",
            }
        )
        traces.append(_points(name, points, measured, color, number))
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": REFERENCE,
            "x": [0],
            "y": [_short(reference.reward)],
            "marker": {"color": "#888888", "symbol": "cross", "size": 11},
            "cliponaxis": False,
        }
    )
    layout = {
        "xaxis": {"title": {"text": "KL(π ‖ π_ref), nats per response"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "gold reward"}},
        "hovermode": "closest",
    }
    note = "Bars are 95 % intervals. Policies on a line between two hull corners can be had by "
    note += "answering with either at random."
    figure = Figure("frontier", "What is gained for the distance", traces, layout, note)
    return figure, _areas(frontiers)


def diversity_figure(policies: Sequence[PolicyMeasures]) -> Figure | None:
    """Reward or win rate over the diversity of answers; None without both of two policies."""
    y_name = _shared(policies, ["gold_reward"]) or _shared(policies, _win_rates(policies))
    x_name = _shared(policies, _DIVERSITIES)
    if x_name is None or y_name is None:
        return None
    traces = []
    for number, policy in enumerate(policies):
        x, y = policy.named(x_name), policy.named(y_name)
        if x is None or y is None:
            continue
        is_reference = policy.policy == REFERENCE
        color = "#888888" if is_reference else PALETTE[(number - 1) % len(PALETTE)]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": policy.policy,
                "text": [policy.policy],
                "textposition": "top center",
                "x": [_short(x.mean)],
                "y": [_short(y.mean)],
                "error_x": _bars([x], color),
                "error_y": _bars([y], color),
                "marker": {
                    "color": color,
                    "size": 10,
                    "symbol": SYMBOLS[(number - 1) % len(SYMBOLS)],
                },
                "cliponaxis": False,
                "showlegend": False,
            }
        )
    layout = {
        "xaxis": {"title": {"text": _axis_title(policies, x_name)}},
        "yaxis": {"title": {"text": _axis_title(policies, y_name)}},
        "hovermode": "closest",
    }
    note = (
        "More reward is up, more varied answers are to the right: far from the reference they may "
    )
    note += "be noise. Bars are 95 % intervals."
    return Figure("diversity", "Reward and diversity of the answers", traces, layout, note)


def _points(
    name: str,
    points: Sequence[PolicyPoint],
    measured: dict[str, PolicyMeasures],
    color: str,
    number: int,
) -> dict[str, Any]:
    def bars(measure: str) -> dict[str, Any]:
        return _bars([measured[point.label].named(measure) for point in points], color)

    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": name,
        "text": [point.label for point in points],
        "textposition": "top right",
        "cliponaxis": False,
        "x": [_short(point.kl) for point in points],
        "y": [_short(point.reward) for point in points],
        "error_x": bars("kl_policy_ref"),
        "error_y": bars("gold_reward"),
        "marker": {"color": color, "size": 10, "symbol": SYMBOLS[number % len(SYMBOLS)]},
    }


def _areas(frontiers: dict[str, Frontier]) -> Table:
    rows = [
        (
            name,
            f"{frontier.area:.3f}",
            interval(frontier.low, frontier.high),
            f"{frontier.budget:.2f}",
            ", ".join(point.label for point in frontier.points),
            ", ".join(frontier.dominated) or "–",
        )
        for name, frontier in frontiers.items()
    ]
    header = ("group", "area", "95 % interval", "up to nats", "on the frontier", "dominated")
    return Table(header, rows, "Area under the frontier: 1 is the largest gain at no cost in KL.")


def interval(low: float, high: float) -> str:
    """`low to high` to three digits; a dash if there is none.

    >>> interval(0.12345, 2), interval(float("nan"), 1)
    ('0.123 to 2', '–')
    """
    return "–" if low != low or high != high else f"{low:.3g} to {high:.3g}"


def ends_of(measure: Measure) -> tuple[float, float]:
    """A measure's 95 % interval; (nan, nan) without a standard error."""
    prompts = len({prompt for prompt, *_ in measure.values}) or measure.num
    return mean_interval(
        measure.mean, measure.standard_error, prompts, is_share=measure.unit == "share"
    )


def _bars(measures: Sequence[Measure | None], color: str) -> dict[str, Any]:
    above, below = [], []
    for each in measures:
        low, high = (math.nan, math.nan) if each is None else ends_of(each)
        above.append(0.0 if each is None or high != high else _short(high - each.mean))
        below.append(0.0 if each is None or low != low else _short(each.mean - low))
    bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return {**bars, "color": color, "thickness": 1.2, "width": 4}


def _win_rates(policies: Sequence[PolicyMeasures]) -> list[str]:
    """Those of any judge; the reference has none against itself."""
    return [m.name for policy in policies for m in policy.measures if m.name.startswith("win_rate")]


def _shared(policies: Sequence[PolicyMeasures], names: Sequence[str]) -> str | None:
    """The first of the measures that at least two policies have."""
    for name in names:
        if sum(policy.named(name) is not None for policy in policies) > 1:
            return name
    return None


def _axis_title(policies: Sequence[PolicyMeasures], name: str) -> str:
    found = next(m for policy in policies if (m := policy.named(name)) is not None)
    return f"{name}, {found.unit}" if found.unit else name


def _short(value: float) -> float:
    return float(f"{value:.5g}")
