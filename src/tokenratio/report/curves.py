"""The curves of runs: every metric of a log as a figure, smoothed and thinned for the page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenratio.evaluation.stability import MetricsLog, ends
from tokenratio.report.artefacts import RunFiles
from tokenratio.report.content import Figure, Table

Array = NDArray[np.float64]

# Okabe and Ito's, told apart with colour-blind eyes; those with contrast on white and black first.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "star")
# Points of all curves of a page together: about 3 MB.
_MOST_POINTS = 120_000
_MOST_OF_A_CURVE, _FEWEST_OF_A_CURVE = 2000, 100
# The smoothed curve is a mean that forgets over this share of the run.
_MEMORY = 0.04
_SMOOTH_FROM = 12  # points; fewer are shown as they are


@dataclass(frozen=True)
class Panel:
    """A figure of one run: the metrics in it, of which each has its own figure for several runs.

    Attributes:
        metrics: by name in the log, with the label in the figure.
        is_main: shown at once; others are folded.
        axis: plotly's settings of the y axis.
    """

    name: str
    title: str
    metrics: Mapping[str, str]
    is_main: bool = True
    axis: Mapping[str, Any] | None = None


_SHARE = {"tickformat": ".0%"}
PANELS = (
    Panel("loss", "Loss", {"loss": "loss"}),
    Panel("margin", "Reward margin, chosen − rejected", {"rewards/margins": "margin"}),
    Panel(
        "accuracy",
        "Accuracy, share of pairs ordered as labelled",
        {"rewards/accuracies": "accuracy"},
        axis=_SHARE | {"range": [-0.02, 1.02]},
    ),
    Panel(
        "log-ratio",
        "Log-ratio to the reference, nats per token",
        {"log_ratio/chosen": "chosen", "log_ratio/mean": "both responses"},
    ),
    Panel("kl", "KL(π_ref ‖ π), nats per token", {"kl_ref_policy": "KL"}),
    Panel("entropy", "Entropy, nats per token", {"entropy": "entropy"}),
    Panel("grad-norm", "Gradient norm before clipping", {"grad_norm": "gradient norm"}),
    Panel("extremes", "Largest |log-ratio| of a token, nats", {"log_ratio/max_abs": "largest"}),
    Panel(
        "state-weight",
        "State weight log w, nats",
        {"state_weight/mean": "mean", "state_weight/std": "standard deviation"},
    ),
    Panel(
        "clamped",
        "Share of states with a clamped weight",
        {"state_weight/clamped": "clamped"},
        axis=_SHARE | {"rangemode": "tozero"},
    ),
    Panel(
        "rewards",
        "Rewards",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
        is_main=False,
    ),
    Panel(
        "logps",
        "Log-probability, nats per response",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
        is_main=False,
    ),
    Panel("anchor", "Cross-entropy of the NLL anchor", {"sft_anchor": "anchor"}, is_main=False),
    Panel("learning-rate", "Learning rate", {"learning_rate": "learning rate"}, is_main=False),
    Panel("speed", "Tokens per second", {"tokens_per_second": "tokens/s"}, is_main=False),
)
# Those that say nothing as a curve.
_NO_CURVE = ("step", "epoch", "rewards/ties", "tokens/past_shorter", "alarm/displacement")


def curve_figures(runs: Sequence[RunFiles]) -> tuple[list[Figure], list[Figure]]:
    """The main figures and the others: of one run by subject, of several by metric, overlaid."""
    panels = [*PANELS, *_other_panels([run.log for run in runs if run.log is not None])]
    if len(runs) > 1:
        panels = [each for panel in panels for each in _by_metric(panel)]
    drawn = []
    num_curves = sum(len(panel.metrics) for panel in panels) * max(1, len(runs))
    limit = min(_MOST_OF_A_CURVE, max(_FEWEST_OF_A_CURVE, _MOST_POINTS // num_curves))
    for panel in panels:
        traces: list[dict[str, Any]] = []
        for index, run in enumerate(runs):
            if run.log is not None:
                traces += _traces(run, panel, index if len(runs) > 1 else None, limit)
        if traces:
            drawn.append((panel.is_main, _figure(panel, traces, runs)))
    return [f for is_main, f in drawn if is_main], [f for is_main, f in drawn if not is_main]


def ends_table(runs: Sequence[RunFiles]) -> Table | None:
    """Each metric's mean over the first and the last tenth, and its last held-out value."""
    panels = [*PANELS, *_other_panels([run.log for run in runs if run.log is not None])]
    rows = []
    for metric in (metric for panel in panels for metric in panel.metrics):
        cells = [cell for run in runs for cell in _ends_of(run, metric)]
        if set(cells) != {"–"}:
            rows.append((metric, *cells))
    names = [""] if len(runs) == 1 else [f"{run.name}: " for run in runs]
    header = [f"{name}{what}" for name in names for what in ("start", "end", "held out")]
    caption = "Means over the first and the last tenth of the steps; the last evaluation."
    return Table(("metric", *header), rows, caption) if rows else None


def _ends_of(run: RunFiles, metric: str) -> Iterator[str]:
    if run.log is None:
        yield from ("–", "–", "–")
        return
    _, values = _column(run.log.lines, metric)
    yield from (_text(part.mean()) for part in ends(values)) if len(values) else ("–", "–")
    held_out = [_column(run.log.evaluations, key)[1] for key, _ in _evaluations(run.log, metric)]
    yield ", ".join(_text(each[-1]) for each in held_out if len(each)) or "–"


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def evaluated_as(name: str, metric: str) -> str | None:
    """The held-out set of a logged `eval_*` metric; "" if it has no name, None if it is another.

    >>> evaluated_as("eval_loss", "loss"), evaluated_as("eval_easy_loss", "loss")
    ('', 'easy')
    """
    if name == f"eval_{metric}":
        return ""
    if name.startswith("eval_") and name.endswith(f"_{metric}"):
        return name[len("eval_") : -len(f"_{metric}")]
    return None


def _by_metric(panel: Panel) -> Iterator[Panel]:
    """A panel for each metric."""
    if len(panel.metrics) == 1:
        yield panel
        return
    for metric, label in panel.metrics.items():
        name = f"{panel.name}-{label.replace(' ', '-')}"
        yield Panel(name, f"{panel.title}: {label}", {metric: label}, panel.is_main, panel.axis)


def _other_panels(logs: Sequence[MetricsLog]) -> list[Panel]:
    """One for each metric that no panel knows."""
    known = {metric for panel in PANELS for metric in panel.metrics} | set(_NO_CURVE)
    names = {
        name: None
        for log in logs
        for line in log.lines
        for name, value in line.items()
        if name not in known and isinstance(value, int | float)
    }
    return [
        Panel(f"other-{number}", name, {name: name}, is_main=False)
        for number, name in enumerate(names)
    ]


def _figure(panel: Panel, traces: list[dict[str, Any]], runs: Sequence[RunFiles]) -> Figure:
    axis = dict(panel.axis or {})
    shown = [value for trace in traces for value in trace["y"] if value is not None]
    if panel.name == "grad-norm" and shown and 0 < min(shown) * 20 < max(shown):
        axis |= {"type": "log", "dtick": 1}
    layout: dict[str, Any] = {"xaxis": {"title": {"text": "step"}}, "yaxis": axis}
    layout["showlegend"] = sum(trace.get("meta") != "raw" for trace in traces) > 1
    if len(runs) == 1:
        resumed = runs[0].record.get("resumptions")
        steps = [each.get("step") for each in resumed or () if isinstance(each, Mapping)]
        layout["shapes"] = [
            {"type": "line", "x0": step, "x1": step, "yref": "paper", "y0": 0, "y1": 1}
            | {"line": {"dash": "dot", "width": 1, "color": "#888888"}}
            for step in steps
            if isinstance(step, int)
        ]
    return Figure(panel.name, panel.title, traces, layout)


def _traces(
    run: RunFiles, panel: Panel, number: int | None, limit: int
) -> Iterator[dict[str, Any]]:
    """The curves of a run in a panel: raw values faintly, smoothed ones, and evaluations.

    Args:
        number: of the run among several, for its colour; None if it is the only one.
    """
    assert run.log is not None
    for index, (metric, label) in enumerate(panel.metrics.items()):
        own = index if number is None else number
        color, dash = PALETTE[own % len(PALETTE)], DASHES[own % len(DASHES)]
        name, prefix = (label, f"{label}, ") if number is None else (run.name, f"{run.name}, ")
        if number is None and len(panel.metrics) == 1:
            name, prefix = "training", ""
        steps, values = _column(run.log.lines, metric)
        if len(values):
            yield from _training_traces(name, steps, values, {"color": color, "dash": dash}, limit)
        for key, where in _evaluations(run.log, metric):
            at, held_out = _column(run.log.evaluations, key)
            if not prefix:
                own, color = own + 1, PALETTE[(own + 1) % len(PALETTE)]
            yield _trace(
                f"{prefix}held out" + (f": {where}" if where else ""),
                at,
                held_out,
                mode="lines+markers",
                line={"color": color, "width": 1.2, "dash": "dot"},
                marker={"size": 7, "symbol": SYMBOLS[(own + 1) % len(SYMBOLS)], "color": color},
                # Colour and markers say so; a legend of several runs would fill the figure.
                showlegend=number is None or not len(values),
            )


def _training_traces(
    name: str, steps: Array, values: Array, style: Mapping[str, Any], limit: int
) -> Iterator[dict[str, Any]]:
    kept = _extremes(values, limit)
    is_smoothed = len(values) >= _SMOOTH_FROM
    yield _trace(
        f"{name}, each step" if is_smoothed else name,
        steps[kept],
        values[kept],
        mode="lines" if len(values) > 1 else "markers",
        line={"color": style["color"], "width": 1} if is_smoothed else {**style, "width": 2.2},
        **({"opacity": 0.35, "meta": "raw", "showlegend": False} if is_smoothed else {}),
    )
    if is_smoothed:
        every = np.unique(np.linspace(0, len(values) - 1, min(len(values), limit // 2)).astype(int))
        smooth = smoothed(values)
        yield _trace(name, steps[every], smooth[every], mode="lines", line={**style, "width": 2.2})


def smoothed(values: Array) -> Array:
    """The exponential moving average over about 4 % of the values, without a bias at the start."""
    keep = 1 - 1 / max(1.0, _MEMORY * len(values))
    total = weight = 0.0
    result = np.empty_like(values)
    for index, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        result[index] = total / weight
    return result


def _extremes(values: Array, limit: int) -> NDArray[np.int_]:
    """Indices of at most `limit` values: each interval's smallest and largest, and the ends."""
    if len(values) <= limit:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), limit // 2 - 1):
        kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    return np.array(sorted(kept))


def _evaluations(log: MetricsLog, metric: str) -> Iterator[tuple[str, str]]:
    """The names under which a metric was logged in evaluations, with that of the held-out set."""
    for name in {name: None for line in log.evaluations for name in line}:
        where = evaluated_as(name, metric)
        if where is not None:
            yield name, where


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[Array, Array]:
    """Steps and finite values of whatever was logged under a name."""
    found = [
        (line["step"], float(value))
        for line in lines
        if isinstance(value := line.get(name), int | float) and abs(value) < 1e300
    ]
    steps, values = np.array(found, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _trace(name: str, x: Array, y: Array, **style: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": name,
        "x": [int(step) if step == int(step) else float(step) for step in x],
        "y": [float(f"{value:.5g}") for value in y],
        **style,
    }
