"""Training progress: a bar on a terminal, lines elsewhere."""

import logging
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tokenratio.cli.terminal import is_terminal
from tokenratio.evaluation.estimates import wilson_interval

# Without tqdm's steps per second, the metrics fit in 80 columns.
_BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def use_terminal(trainer: Trainer, *, every: int = 1) -> None:
    """Report a trainer's progress with a bar on a terminal, with `Lines(every)` elsewhere."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not is_terminal() or trainer.args.disable_tqdm:
        trainer.add_callback(Lines(every))
        return
    trainer.add_callback(Bar)
    logger = logging.getLogger("tokenratio")
    if not any(isinstance(handler, _AboveTheBar) for handler in logger.handlers):
        logger.addHandler(_AboveTheBar())


class _AboveTheBar(logging.Handler):
    """Prints the package's warnings on lines of their own."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class Bar(ProgressCallback):
    """A progress bar that ends in the latest metrics; evaluations are lines above it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.bar_format = _BAR_FORMAT
            if state.global_step > 0:
                self.training_bar.write(describe_resumption(state), file=sys.stdout)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs.get("logs")
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(describe_briefly(logs))
        for line in describe_evaluations(logs, kwargs.get("eval_dataloader"), state.global_step):
            self.training_bar.write(line, file=sys.stdout)


class Lines(TrainerCallback):
    """A line on standard output for each logged step and each evaluation while training.

    Args:
        every: print one in this many logged steps; the first and the last are always printed.
    """

    def __init__(self, every: int = 1) -> None:
        self._every, self._num = every, 0
        self._start: tuple[float, int] | None = None  # time in seconds, step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.monotonic(), state.global_step
        if state.is_world_process_zero and state.global_step > 0:
            print(describe_resumption(state), flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs.get("logs")
        if not state.is_world_process_zero or self._start is None or not logs:
            return
        if "loss" in logs:
            if self._num % self._every == 0 or state.global_step == state.max_steps:
                print(describe_step(logs, state, _seconds_left(state, *self._start)), flush=True)
            self._num += 1
        for line in describe_evaluations(logs, kwargs.get("eval_dataloader"), state.global_step):
            print(line, flush=True)


def _seconds_left(state: TrainerState, begin: float, first_step: int) -> float | None:
    """Estimate from the steps done since `begin`; None before the first."""
    done = state.global_step - first_step
    if done <= 0:
        return None
    return (time.monotonic() - begin) / done * max(0, state.max_steps - state.global_step)


def describe_resumption(state: TrainerState) -> str:
    """The step from which a run is resumed, in words."""
    return f"resumed from step {state.global_step} of {state.max_steps} (epoch {state.epoch:.2f})"


def describe_step(logs: Mapping[str, float], state: TrainerState, seconds: float | None) -> str:
    """A logged step in a line, with the estimated seconds left, if known."""
    values = {**logs, "accuracy": accuracy_of(logs)}
    shown = {
        "loss": "loss {:.4f}",
        "accuracy": "accuracy {:.3f}",
        "rewards/margins": "margin {:.4g}",
        "learning_rate": "lr {:.3g}",
        "tokens_per_second": "{:,.0f} tokens/s",
    }
    parts = [
        text.format(values[name]) for name, text in shown.items() if values.get(name) is not None
    ]
    if seconds is not None:
        parts.append(f"{timedelta(seconds=round(seconds))} left")
    where = f"step {state.global_step}/{state.max_steps}"
    return f"{where} (epoch {state.epoch or 0:.2f}): {', '.join(parts)}"


def describe_briefly(logs: Mapping[str, float]) -> str:
    """A logged step, short enough to fit next to a bar in 80 columns."""
    parts = [f"loss={logs['loss']:.3f}"]
    accuracy = accuracy_of(logs)
    if accuracy is not None:
        parts.append(f"acc={accuracy:.2f}")
    if "tokens_per_second" in logs:
        parts.append(f"tok/s={tqdm.format_sizeof(logs['tokens_per_second'])}")
    return ", ".join(parts)


def describe_evaluations(logs: Mapping[str, float], eval_dataloader: Any, step: int) -> list[str]:
    """The line of each evaluation that was logged; none for other logs."""
    names = [name for name in logs if name.startswith("eval_") and name.endswith("_loss")]
    dataset = getattr(eval_dataloader, "dataset", None)
    lines = []
    for name in names if dataset is not None else []:
        prefix = name.removesuffix("loss")
        part = prefix.removeprefix("eval_").strip("_")
        where = f"evaluation at step {step}" + (f", {part}" if part else "")
        lines.append(f"{where}: {describe_held_out(logs, len(dataset), prefix)}")
    return lines


def describe_held_out(metrics: Mapping[str, float], num: int, prefix: str = "eval_") -> str:
    """Metrics on `num` held-out rows in words; for pairs, the accuracy with its interval."""
    loss = f"loss {metrics[prefix + 'loss']:.4f}"
    figures = held_out_figures(metrics, num, prefix)
    if figures is None:
        return f"{loss} ({num} rows)"
    margin = f"margin {metrics[prefix + 'rewards/margins']:.4g}"
    return f"reward {describe_accuracy(**figures)}, {margin}, {loss}"


def describe_accuracy(
    accuracy: float, interval: tuple[float, float], num_pairs: int, num_ties: int
) -> str:
    """An accuracy with its interval.

    >>> describe_accuracy(0.6, (0.474, 0.714), 60, 2)
    'accuracy 0.600 (95 % 0.474–0.714; 60 pairs, 2 ties)'
    """
    ties = "no ties" if num_ties == 0 else f"{num_ties} tie{'s' * (num_ties > 1)}"
    low, high = interval
    return f"accuracy {accuracy:.3f} (95 % {low:.3f}–{high:.3f}; {num_pairs} pairs, {ties})"


def held_out_figures(
    metrics: Mapping[str, float], num: int, prefix: str = "eval_"
) -> dict[str, Any] | None:
    """The arguments of `describe_accuracy`, with Wilson's 95 % interval; None for other data."""
    accuracy = accuracy_of(metrics, prefix)
    if accuracy is None:
        return None
    return {
        "accuracy": accuracy,
        "interval": wilson_interval(accuracy, num),
        "num_pairs": num,
        "num_ties": round(metrics.get(prefix + "rewards/ties", 0.0) * num),
    }


def accuracy_of(logs: Mapping[str, float], prefix: str = "") -> float | None:
    """How often the chosen response has the larger reward, a tie counting half.

    `rewards/accuracies` is TRL's, which counts a tie as a miss.
    """
    accuracy = logs.get(prefix + "rewards/accuracies")
    ties = logs.get(prefix + "rewards/ties", 0.0)
    return None if accuracy is None else min(1.0, accuracy + ties / 2)
