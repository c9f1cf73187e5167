"""The stability of a training run: gradient tails, loss spikes and drift, from its log."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np
from numpy.typing import NDArray

from tokenratio.errors import TokenRatioError
from tokenratio.records import as_shape, parse_json
from tokenratio.run_folder import METRICS_FILE

Array = NDArray[np.float64]

# A spike is a loss more than this many median absolute deviations (MADs) above the median of the
# steps before it. In 300 steps of normal noise, one run in 70 has a false spike.
SPIKE_MADS = 8.0
# The steps before it that are compared: at most, and at least.
SPIKE_WINDOW, SPIKE_HISTORY = 50, 20
# A loss that hardly moves has a MAD near 0: rises below 8 × 0.1 % of it are not spikes.
_SMALLEST_MAD = 1e-3


@dataclass(frozen=True)
class MetricsLog:
    """The lines of a `metrics.jsonl`, one per step, in the order of the steps.

    Attributes:
        lines: what was logged in training, including `step`.
        evaluations: what was logged in evaluations (`eval_*`), including `step`.
        num_truncated: 1 if the last line was cut off and left out (the run was killed).
        num_duplicates: lines left out because a later line logs the same step (a resumed run).
    """

    lines: tuple[Mapping[str, Any], ...]
    num_truncated: int
    num_duplicates: int
    evaluations: tuple[Mapping[str, Any], ...] = ()

    def column(self, name: str) -> tuple[Array, Array]:
        """Steps and values of one metric where it was logged and is finite."""
        logged = [(line["step"], line[name]) for line in self.lines if name in line]
        table = np.array(logged, dtype=np.float64).reshape(-1, 2)
        steps, values = table[np.isfinite(table[:, 1])].T
        return steps, values

    def num_not_finite(self, name: str) -> int:
        """Lines in which a metric is nan or infinite."""
        return sum(not math.isfinite(line[name]) for line in self.lines if name in line)


@dataclass(frozen=True)
class Stability:
    """The stability of a run, from its log.

    Attributes:
        values: by name, for the metrics that were logged. `…/start` and `…/end` are means over the
            first and the last tenth of the steps, at least 5 steps if there are 10. Units are those
            of the metrics: nats for log-probabilities, log-ratios and the KL.
        sentences: the same in words, alarms first.
    """

    values: dict[str, float]
    sentences: list[str]


# Those metrics that are read; a line may have any others.
_Line = TypedDict(
    "_Line",
    {
        "step": Required[int],
        "epoch": float,
        "loss": float,
        "grad_norm": float,
        "kl_ref_policy": float,
        "log_ratio/mean": float,
        "log_ratio/chosen": float,
        "logps/chosen": float,
        "rewards/margins": float,
        "rewards/accuracies": float,
        "state_weight/clamped": float,
    },
    total=False,
)


def read_metrics(path: str | Path) -> MetricsLog:
    """The lines of a `metrics.jsonl`, given as the file or its run folder.

    Lines without `loss` are those of evaluations. A last line that is cut off is left out and
    counted; of several training lines for one step the last is kept.

    Raises:
        TokenRatioError: the file cannot be read, a line is not of metrics, or there is no training
            line; names file and line.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    try:
        raw = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TokenRatioError(
            f"{path} cannot be read ({error.strerror}): give a run folder or its {METRICS_FILE}"
        ) from None
    numbered = [(number, line) for number, line in enumerate(raw, 1) if line.strip()]
    by_step: dict[float, Mapping[str, Any]] = {}
    evaluated: dict[float, dict[str, Any]] = {}  # several sets of one step have a line each
    num_training, num_truncated = 0, 0
    for number, text in numbered:
        try:
            line = parse_json(text)
        except ValueError:
            if number == numbered[-1][0]:
                num_truncated = 1
                continue
            raise TokenRatioError(
                f"{path}:{number}: not JSON. Only a run's last line may be cut off; remove this one"
            ) from None
        line = as_shape(_Line, line, f"{path}:{number}", f"this is not a line of {METRICS_FILE}")
        if "loss" in line:
            num_training += 1
            by_step[line["step"]] = line
        else:
            evaluated.setdefault(line["step"], {}).update(line)
    if not by_step:
        raise TokenRatioError(f"{path} holds no training step: no complete line has a loss")
    lines, evaluations = (tuple(of[step] for step in sorted(of)) for of in (by_step, evaluated))
    return MetricsLog(lines, num_truncated, num_training - len(by_step), evaluations)


def stability(log: MetricsLog) -> Stability:
    """Gradient-norm tails, loss spikes, KL drift and displacement of the chosen log-probability.

    Values: `steps`, `lines/truncated`, `lines/duplicate`, `not_finite`; `grad_norm/median`, `/p95`,
    `/p99`, `/max`, `/max_over_median`; `loss/start`, `/end`, `/spikes`, `/spike_share` (of the
    steps judged), `/largest_rise` in MADs above the median of the 50 steps before; `/start` and
    `/end` of `kl_ref_policy` (and `/max`), `log_ratio/mean`, `rewards/margins`; of
    `log_ratio/chosen` and `logps/chosen` also `/share_below_start`, the share of later steps;
    `chosen/alarm`, 1 if the chosen responses became less likely while margins rose, both by more
    than two standard errors.
    """
    values: dict[str, float] = {
        "steps": len(log.lines),
        "lines/truncated": log.num_truncated,
        "lines/duplicate": log.num_duplicates,
        "not_finite": sum(map(log.num_not_finite, ("loss", "grad_norm"))),
    }
    sentences = [*_of_file(values), *_gradients(log, values), *_loss(log, values)]
    sentences += [*_drift(log, values), *_displacement(log, values)]
    sentences.sort(key=lambda sentence: not sentence.startswith("ALARM"))
    return Stability({name: float(value) for name, value in values.items()}, sentences)


def _of_file(values: dict[str, float]) -> list[str]:
    sentences = [f"{values['steps']} steps are logged."]
    if values["lines/truncated"]:
        sentences.append("The last line is cut off and left out: the run was interrupted.")
    if number := values["lines/duplicate"]:
        sentences.append(f"{number} lines are left out: their steps were logged again later.")
    if number := values["not_finite"]:
        sentences.append(f"ALARM: {number} losses or gradient norms are not finite (left out).")
    return sentences


def _gradients(log: MetricsLog, values: dict[str, float]) -> list[str]:
    steps, norms = log.column("grad_norm")
    if not len(norms):
        return ["No gradient norm is logged."]
    median, p95, p99, largest = np.quantile(norms, (0.5, 0.95, 0.99, 1.0)).tolist()
    ratio = largest / median if median > 0 else math.nan
    tails = {"median": median, "p95": p95, "p99": p99, "max": largest, "max_over_median": ratio}
    values |= {f"grad_norm/{name}": value for name, value in tails.items()}
    return [
        f"The gradient norm's median is {median:.3g}, its 99th percentile {p99:.3g}, its largest "
        f"{largest:.3g} at step {steps[norms.argmax()]:.0f}, {ratio:.1f} times the median."
    ]


def _loss(log: MetricsLog, values: dict[str, float]) -> list[str]:
    steps, losses = log.column("loss")
    if not len(losses):
        return []
    start, end = ends(losses)
    values |= {"loss/start": start.mean(), "loss/end": end.mean()}
    rises = loss_rises(losses)
    if not len(rises):
        return [f"Too few steps to look for loss spikes: more than {SPIKE_HISTORY} are needed."]
    spikes, largest = rises > SPIKE_MADS, int(rises.argmax())
    values |= {
        "loss/spikes": float(spikes.sum()),
        "loss/spike_share": float(spikes.mean()),
        "loss/largest_rise": float(rises[largest]),
    }
    return [
        f"Loss spikes (more than {SPIKE_MADS:g} MADs above the median of the {SPIKE_WINDOW} steps "
        f"before): {spikes.sum()}; the largest rise is {rises[largest]:.1f} MADs, at step "
        f"{steps[SPIKE_HISTORY + largest]:.0f}."
    ]


def loss_rises(losses: Array) -> Array:
    """How far each loss lies above the median of the steps before it, in their MADs.

    Returns:
        A value for every loss from index `SPIKE_HISTORY` on.
    """
    rises = np.empty(max(0, len(losses) - SPIKE_HISTORY))
    for index in range(len(rises)):
        step = index + SPIKE_HISTORY
        before = losses[max(0, step - SPIKE_WINDOW) : step]
        median = np.median(before)
        mad = max(np.median(np.abs(before - median)), _SMALLEST_MAD * abs(median), 1e-12)
        rises[index] = (losses[step] - median) / mad
    return rises


def _drift(log: MetricsLog, values: dict[str, float]) -> list[str]:
    sentences = []
    for name, words in (
        ("kl_ref_policy", "KL(π_ref ‖ π)"),
        ("log_ratio/mean", "The mean log-ratio to the reference"),
    ):
        _, column = log.column(name)
        if len(column):
            start, end = (part.mean() for part in ends(column))
            values |= {f"{name}/start": start, f"{name}/end": end}
            sentences.append(f"{words} went from {start:.3g} to {end:.3g} nats per token.")
    if "kl_ref_policy/end" in values:
        values["kl_ref_policy/max"] = float(log.column("kl_ref_policy")[1].max())
    return sentences


def _displacement(log: MetricsLog, values: dict[str, float]) -> list[str]:
    """How likely the chosen responses became, with an alarm if less so while the margin grew.

    The log-ratio shows it best: it starts at 0 and is per token, while a batch's mean
    log-probability depends on the length of its responses.
    """
    sentences, fell = [], None
    for name, words, unit in (
        ("log_ratio/chosen", "The chosen tokens' log-ratio", "nats per token"),
        ("logps/chosen", "The chosen responses' log-probability", "nats per response"),
    ):
        _, column = log.column(name)
        if not len(column):
            continue
        start, end = ends(column)
        below = float((column[len(start) :] < start.mean()).mean()) if len(column) > 1 else 0.0
        values |= {f"{name}/start": start.mean(), f"{name}/end": end.mean()}
        values[f"{name}/share_below_start"] = below
        sentences.append(
            f"{words} went from {start.mean():.3g} to {end.mean():.3g} {unit}; {below:.0%} of the "
            "later steps are below the start."
        )
        fell = _is_higher(start, end) if fell is None else fell  # the first one logged decides
    _, margins = log.column("rewards/margins")
    if not len(margins) or fell is None:
        return sentences
    start, end = ends(margins)
    values |= {"rewards/margins/start": start.mean(), "rewards/margins/end": end.mean()}
    alarm = fell and _is_higher(end, start)
    values["chosen/alarm"] = float(alarm)
    if alarm:
        sentences.append(
            "ALARM: the chosen responses became less likely while the margins rose: both responses "
            "lose probability to others. Read the policy's responses before trusting the margin."
        )
    return sentences


def ends(column: Array) -> tuple[Array, Array]:
    """The first and the last tenth, at least 5 values each unless they would overlap."""
    size = max(1, min(len(column) // 2, max(5, len(column) // 10)))
    return column[:size], column[-size:]


def _is_higher(high: Array, low: Array) -> bool:
    """Whether the mean of `high` exceeds that of `low` by more than two standard errors."""
    errors = [part.var(ddof=1) / len(part) if len(part) > 1 else 0.0 for part in (low, high)]
    return bool(high.mean() - low.mean() > 2 * math.sqrt(sum(errors)))
