"""The displacement alarm: chosen responses lose probability while the margins rise."""

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from transformers import TrainerCallback, TrainerState

from tokenratio.training.config import TokenRatioConfig

DISPLACEMENT_ALARM = "alarm/displacement"
# How many logged lines are looked at together.
_FEWEST_LINES, _MOST_LINES = 5, 20
# A response of 100 tokens that loses a nat has lost almost two thirds of its probability.
_SMALLEST_LOSS = 0.01
# How many standard errors the loss and the margin must be from 0; the first is strict, because a
# long run is tested often.
_LOSS_ERRORS, _MARGIN_ERRORS = 4.0, 2.0
_log = logging.getLogger(__name__)


def is_displaced(log_ratios: Sequence[float], margins: Sequence[float]) -> bool:
    """Whether chosen responses clearly lose probability while the margins are positive.

    The policy starts as its reference, so a log-ratio below 0 is a loss.

    Args:
        log_ratios: `log_ratio/chosen` of successive logged lines, nats per token.
        margins: `rewards/margins` of the same lines.

    >>> is_displaced([-0.05, -0.06, -0.05, -0.07, -0.06], [0.3, 0.4, 0.4, 0.5, 0.4])
    True
    >>> is_displaced([-0.05, 0.06, -0.05, 0.07, -0.06], [0.3, 0.4, 0.4, 0.5, 0.4])
    False
    """
    if len(log_ratios) < _FEWEST_LINES:
        return False
    fell = fmean(log_ratios) + _LOSS_ERRORS * _error(log_ratios) < -_SMALLEST_LOSS
    return fell and fmean(margins) - _MARGIN_ERRORS * _error(margins) > 0


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return stdev(values) / math.sqrt(len(values))


class DisplacementAlarm(TrainerCallback):
    """Watches a run's logged lines; warns once, and marks the line."""

    def __init__(self, config: TokenRatioConfig) -> None:
        self._config = config
        self._lines: deque[tuple[float, float]] = deque(maxlen=_MOST_LINES)
        self._has_warned = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._lines.clear()
        self._has_warned = False
        for line in state.log_history:  # of a resumed run
            self.update(line, int(line["step"]))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any
    ) -> None:
        warning = None if logs is None else self.update(logs, state.global_step)
        if logs is not None and warning is not None:
            logs[DISPLACEMENT_ALARM] = 1.0  # written by the callbacks after this one
            if state.is_world_process_zero:
                _log.warning("%s", warning)

    def update(self, line: Mapping[str, float], step: int) -> str | None:
        """The warning due after this line; None if there is none."""
        log_ratio, margin = (line.get(n, math.nan) for n in ("log_ratio/chosen", "rewards/margins"))
        if not (math.isfinite(log_ratio) and math.isfinite(margin)):
            return None
        self._lines.append((log_ratio, margin))
        if self._has_warned:
            return None
        log_ratios, margins = zip(*self._lines, strict=True)
        if not is_displaced(log_ratios, margins):
            return None
        self._has_warned = True
        return (
            f"ALARM at step {step}: the chosen responses lose probability although the margins "
            f"rise (log_ratio/chosen {fmean(log_ratios):.3f} nats per token over the last "
            f"{len(log_ratios)} logged lines). Their probability goes to responses outside the "
            f"pairs. {displacement_advice(vars(self._config))}; look at samples before trusting "
            "the margins"
        )


def displacement_advice(config: Mapping[str, Any]) -> str:
    """What to change in a run's settings, its `config`, against displacement."""
    sft_weight, beta = config.get("sft_weight"), config.get("beta")
    anchor = (
        f"raise sft_weight (now {sft_weight:g})" if sft_weight else "set sft_weight (such as 0.1)"
    )
    rate = config.get("learning_rate")
    steps = [anchor, "lower learning_rate" + (f" (now {rate:g})" if rate else "")]
    if beta is not None:
        steps.append(f"raise beta (now {beta:g})")
    advice = ", ".join(steps[:-1]) + " or " + steps[-1]
    return advice[0].upper() + advice[1:]
