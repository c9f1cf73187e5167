"""What went wrong in a run, in words, with what to do about it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tokenratio.evaluation.results import PolicyMeasures, measure_of
from tokenratio.evaluation.stability import MetricsLog, ends, stability
from tokenratio.report.artefacts import counted
from tokenratio.training.displacement import DISPLACEMENT_ALARM, displacement_advice

# KL(π_ref ‖ π) in nats per token: at 0.5, the reference's own response of 40 tokens has lost all
# but e^-20 of its probability.
FAR_KL = 0.5
# And it runs away if it ends so many times as far as halfway.
_RUNAWAY = 1.2
# Of later steps or states: more than these shares are no longer single outliers.
MOST_CLAMPED, MOST_CLIPPED = 0.05, 0.5
# A response this much longer or shorter than the reference's, beyond two standard errors.
LENGTH_DRIFT = 1.25
# So many more answers are cut than the reference's, beyond two standard errors; and most of all.
CUT_RISE, MOST_CUT = 0.1, 0.5
_ERRORS = 2.0
_FEWEST = 10  # steps to speak of most of them


@dataclass(frozen=True)
class Alarm:
    """Something to look at.

    Attributes:
        level: `alarm` if results should not be trusted as they are, `watch` otherwise.
        what: in a few words.
        text: the figures behind it.
        advice: what to do.
    """

    level: Literal["alarm", "watch"]
    what: str
    text: str
    advice: str


def alarms_of_run(
    log: MetricsLog | None,
    config: Mapping[str, Any],
    held_out: Mapping[str, Any] | None = None,
) -> list[Alarm]:
    """The alarms of a training run, from its log, settings and `eval.json`; the worst first."""
    found = list(_held_out_order(held_out or {}))
    if log is None:
        return found
    values = stability(log).values
    found += [
        *_not_finite(values),
        *_displaced(log, values, config),
        *_runaway(log),
        *_clamped(log),
        *_clipped(log, config),
        *_spikes(values),
        *_nothing_learnt(log),
    ]
    return sorted(found, key=lambda alarm: alarm.level != "alarm")


def alarms_of_policy(policy: PolicyMeasures, reference: PolicyMeasures | None) -> list[Alarm]:
    """The alarms of an evaluation: answers that do not end, drift of length, what it noted.

    What it noted of the run's log is left out: `alarms_of_run` says more.
    """
    found = list(_endless(policy, reference))
    found += [] if reference is None else _length_drift(policy, reference)
    for note in policy.notes:
        head, _, text = note.partition(": ")
        if head not in ("ALARM", "WATCH") or _is_of_log(text):
            continue
        found.append(
            Alarm(
                "alarm" if head == "ALARM" else "watch",
                "The reward may be fooled" if head == "WATCH" else "The evaluation",
                f"{text[0].upper()}{text[1:]}.",
                "Read the answers below before trusting the figures.",
            )
        )
    return sorted(found, key=lambda alarm: alarm.level != "alarm")


def _is_of_log(text: str) -> bool:
    """Whether `stability` wrote a sentence."""
    return "losses or gradient norms are not finite" in text or text.startswith(
        "the chosen responses became less likely"
    )


def _not_finite(values: Mapping[str, float]) -> Iterator[Alarm]:
    if number := int(values["not_finite"]):
        yield Alarm(
            "alarm",
            "Losses or gradients are not finite",
            f"{counted(number, 'logged value')} of loss or gradient norm: nan or infinite.",
            "Lower learning_rate or max_grad_norm; with fp16 prefer bf16. The error that stopped "
            "the run names the rows.",
        )


def _displaced(
    log: MetricsLog, values: Mapping[str, float], config: Mapping[str, Any]
) -> Iterator[Alarm]:
    """Chosen responses lose probability: as the run saw it, or from start to end."""
    seen = [line["step"] for line in log.lines if line.get(DISPLACEMENT_ALARM)]
    if not seen and not values.get("chosen/alarm"):
        return
    start, end = (values.get(f"log_ratio/chosen/{at}", math.nan) for at in ("start", "end"))
    text = "The chosen responses became less likely while the margins rose"
    if not math.isnan(end):
        text += f": their log-ratio went from {start:.3g} to {end:.3g} nats per token"
    if seen:
        text += f"; the run first saw it at step {seen[0]:,.0f}"
    yield Alarm(
        "alarm",
        "Chosen responses lose probability",
        f"{text}. It goes to responses outside the pairs.",
        f"{displacement_advice(config)}. Read the answers before trusting the margins.",
    )


def _runaway(log: MetricsLog) -> Iterator[Alarm]:
    """The policy is far from its reference; an alarm if it is still moving away."""
    _, kls = log.column("kl_ref_policy")
    if not len(kls):  # losses without a KL log it in evaluations alone
        logged = [line.get("eval_kl_ref_policy") for line in log.evaluations]
        kls = np.array([kl for kl in logged if isinstance(kl, float) and math.isfinite(kl)])
    if not len(kls) or (end := float(ends(kls)[1].mean())) <= FAR_KL:
        return
    half = float(kls[len(kls) // 2 : len(kls) // 2 + max(1, len(kls) // 10)].mean())
    rises = end > _RUNAWAY * half
    yield Alarm(
        "alarm" if rises else "watch",
        "The KL runs away" if rises else "The policy is far from its reference",
        f"KL(π_ref ‖ π) ends at {end:.3g} nats per token"
        + (f", from {half:.3g} halfway, and still rises." if rises else "."),
        "Raise beta, lower learning_rate, or stop earlier: a checkpoint before may be better.",
    )


def _clamped(log: MetricsLog) -> Iterator[Alarm]:
    _, shares = log.column("state_weight/clamped")
    late = float(shares[len(shares) // 2 :].mean()) if len(shares) else 0.0
    if late > MOST_CLAMPED:
        yield Alarm(
            "watch",
            "State weights are clamped",
            f"In the second half, {late:.0%} of the states have a |log w| at baseline_clamp, "
            "where the baseline gets no gradient.",
            "Lower baseline_learning_rate, or raise baseline_clamp.",
        )


def _clipped(log: MetricsLog, config: Mapping[str, Any]) -> Iterator[Alarm]:
    limit = config.get("max_grad_norm") or 0
    _, norms = log.column("grad_norm")
    late = norms[len(norms) // 2 :]
    share = float((late > limit).mean()) if len(late) >= _FEWEST and limit > 0 else 0.0
    if share > MOST_CLIPPED:
        yield Alarm(
            "watch",
            "Most gradients are clipped",
            f"In the second half, the gradient norm exceeds max_grad_norm ({limit:g}) at "
            f"{share:.0%} of the steps (median {np.median(late):.3g}).",
            "The clipping sets the size of the steps, not the learning rate: raise max_grad_norm "
            "and lower learning_rate.",
        )


def _spikes(values: Mapping[str, float]) -> Iterator[Alarm]:
    if number := int(values.get("loss/spikes", 0)):
        yield Alarm(
            "watch",
            "The loss has spikes",
            f"{counted(number, 'spike')}, more than 8 median deviations above the 50 steps before; "
            f"the largest by {values['loss/largest_rise']:.1f}.",
            "Look at the rows of these steps; a longer warm-up or a lower learning_rate helps.",
        )


def _nothing_learnt(log: MetricsLog) -> Iterator[Alarm]:
    """The margins at the end are not above 0."""
    _, margins = log.column("rewards/margins")
    late = margins[-max(5, len(margins) // 10) :]
    if len(margins) < 20:
        return
    error = float(late.std(ddof=1)) / math.sqrt(len(late))
    if float(late.mean()) <= _ERRORS * error:
        yield Alarm(
            "watch",
            "The pairs are not told apart",
            f"The reward margin ends at {late.mean():.3g} ± {error:.2g}, no more than chance.",
            "Raise learning_rate or train longer; `tokenratio inspect-data` shows whether chosen "
            "and rejected are what they should be.",
        )


def _held_out_order(figures: Mapping[str, Any]) -> Iterator[Alarm]:
    """Held-out pairs are ordered no better than by chance, or the wrong way round."""
    interval = (figures.get("held_out") or {}).get("interval")
    if interval is None or interval[0] > 0.5:
        return
    is_worse = interval[1] < 0.5
    yield Alarm(
        "alarm" if is_worse else "watch",
        "Held-out pairs are ordered the wrong way round"
        if is_worse
        else "Held-out pairs are not told apart",
        f"The 95 % interval of the accuracy is {interval[0]:.1%} to {interval[1]:.1%}, "
        + ("below chance (50%)." if is_worse else "which holds chance (50%)."),
        "Compare the training and held-out data with `tokenratio inspect-data`: labels, lengths, "
        "source. More training pairs may help."
        if is_worse
        else "Train longer or on more pairs, or hold out more pairs.",
    )


def _endless(policy: PolicyMeasures, reference: PolicyMeasures | None) -> Iterator[Alarm]:
    """Most answers, or clearly more than the reference's, are cut before they end."""
    ours, theirs = policy.named("cut"), None if reference is None else reference.named("cut")
    if ours is None:
        return
    before = {} if theirs is None else {(id, n): value for id, n, value in theirs.values}
    change = measure_of(
        "cut", [(id, n, v - before[id, n]) for id, n, v in ours.values if (id, n) in before]
    )
    rises = change.mean > max(CUT_RISE, _ERRORS * change.standard_error)  # False for nan
    if rises or ours.mean > MOST_CUT:
        limit = policy.settings.get("max_new_tokens")
        yield Alarm(
            "alarm" if rises else "watch",
            "Answers do not end" if rises else "Most answers are cut",
            f"{ours.mean:.1%} of the answers are cut"
            + (f" at max_new_tokens ({limit})" if limit else "")
            + (f", {theirs.mean:.1%} of the reference's" if theirs is not None else "")
            + ": lengths are lower bounds, and what judges saw is unfinished.",
            "Evaluate with a larger max_new_tokens. If the answers still do not end, training made "
            "the end of a turn unlikely: see it in `tokenratio inspect`.",
        )


def _length_drift(policy: PolicyMeasures, reference: PolicyMeasures) -> Iterator[Alarm]:
    for name in ("length/tokens", "length/words"):
        ours, theirs = policy.named(name), reference.named(name)
        if ours is None or theirs is None or not theirs.mean > 0:
            continue
        ratio = ours.mean / theirs.mean
        error = math.hypot(ours.standard_error, theirs.standard_error)
        is_clear = abs(ours.mean - theirs.mean) > _ERRORS * error  # False for nan
        if is_clear and not 1 / LENGTH_DRIFT <= ratio <= LENGTH_DRIFT:
            longer = "longer" if ratio > 1 else "shorter"
            yield Alarm(
                "watch",
                f"Answers became {longer}",
                f"{ours.mean:.1f} {ours.unit} against the reference's {theirs.mean:.1f}.",
                "Compare the win rate at equal length (lc_win_rate), and the lengths of chosen "
                "and rejected in the data.",
            )
        return
