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

# Without tqdm's steps per second: 80 columns hold the metrics then.
_BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def use_terminal(trainer: Trainer, *, every: int = 1) -> None:
    """Report a trainer's progress with a bar on a terminal, with lines elsewhere.

    Args:
        every: print one in this many logged lines.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if is_terminal() and not trainer.args.disable_tqdm:
        trainer.add_callback(Bar)
        _log_above_the_bar()
    else:
        trainer.add_callback(Lines(every))


def _log_above_the_bar() -> None:
    """Let the package's warnings start on a line of their own."""
    logger = logging.getLogger("tokenratio")
    if not any(isinstance(handler, _AboveTheBar) for handler in logger.handlers):
        logger.addHandler(_AboveTheBar())


class _AboveTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class Bar(ProgressCallback):
    """A progress bar with the latest metrics beside it; evaluations are lines above it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.bar_format = _BAR_FORMAT
            if state.global_step > 0:
                self.training_bar.write(describe_resumption(state), file=sys.stdout)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(describe_briefly(logs))
        for line in describe_evaluations(logs, eval_dataloader, state.global_step):
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
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._start = time.monotonic(), state.global_step
        if state.is_world_process_zero and state.global_step > 0:
            print(describe_resumption(state), flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._start = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or self._start is None or not logs:
            return
        if "loss" in logs:
            is_due = self._num % self._every == 0 or state.global_step == state.max_steps
            self._num += 1
            if is_due:
                print(describe_step(logs, state, self._seconds_left(state)), flush=True)
        for line in describe_evaluations(logs, eval_dataloader, state.global_step):
            print(line, flush=True)

    def _seconds_left(self, state: TrainerState) -> float | None:
        assert self._start is not None
        begin, first = self._start
        done = state.global_step - first
        if done <= 0:
            return None
        return (time.monotonic() - begin) / done * max(0, state.max_steps - state.global_step)


def describe_resumption(state: TrainerState) -> str:
    """From which step a run is resumed."""
    return f"resumed from step {state.global_step} of {state.max_steps} (epoch {state.epoch:.2f})"


def describe_step(logs: Mapping[str, float], state: TrainerState, seconds: float | None) -> str:
    """A logged step in a line.

    Args:
        seconds: estimated time left; None while unknown.
    """
    parts = [f"loss {logs['loss']:.4f}"]
    accuracy = accuracy_of(logs)
    if accuracy is not None:
        parts.append(f"accuracy {accuracy:.3f}")
    for name, shown in (("rewards/margins", "margin {:.4g}"), ("learning_rate", "lr {:.3g}")):
        if name in logs:
            parts.append(shown.format(logs[name]))
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if seconds is not None:
        parts.append(f"{timedelta(seconds=round(seconds))} left")
    where = f"step {state.global_step}/{state.max_steps}"
    return f"{where} (epoch {state.epoch or 0:.2f}): {', '.join(parts)}"


def describe_briefly(logs: Mapping[str, float]) -> str:
    """A logged step, short enough to fit beside a bar in 80 columns."""
    parts = [f"loss={logs['loss']:.3f}"]
    accuracy = accuracy_of(logs)
    if accuracy is not None:
        parts.append(f"acc={accuracy:.2f}")
    if "tokens_per_second" in logs:
        parts.append(f"tok/s={tqdm.format_sizeof(logs['tokens_per_second'])}")
    return ", ".join(parts)


def describe_evaluations(
    logs: Mapping[str, float], eval_dataloader: Any, step: int, prefix: str = "eval_"
) -> list[str]:
    """A line for an evaluation that was logged; none for other lines."""
    names = [name for name in logs if name.startswith(prefix) and name.endswith("_loss")]
    dataset = getattr(eval_dataloader, "dataset", None)
    if not names or dataset is None:
        return []
    (name,) = names
    part = name.removeprefix(prefix).removesuffix("loss").strip("_")
    where = f"evaluation at step {step}" + (f", {part}" if part else "")
    return [f"{where}: {describe_held_out(logs, len(dataset), name.removesuffix('loss'))}"]


def describe_held_out(metrics: Mapping[str, float], num: int, prefix: str = "eval_") -> str:
    """Held-out metrics in words: of pairs the accuracy with its interval, and ties.

    Args:
        num: of rows.
        prefix: of the metrics' names.
    """
    own = {name.removeprefix(prefix): value for name, value in metrics.items()}
    loss = f"loss {own['loss']:.4f}"
    figures = held_out_figures(metrics, num, prefix)
    if figures is None:
        return f"{loss} ({num} rows)"
    margin = f"margin {own['rewards/margins']:.4g}"
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
    """The accuracy on held-out pairs, a tie counting half, and Wilson's 95 % interval.

    Args:
        num: of pairs.
    Returns:
        `accuracy`, `interval`, `num_pairs`, `num_ties`; None where the metrics are not of pairs.
    """
    own = {name.removeprefix(prefix): value for name, value in metrics.items()}
    accuracy = accuracy_of(own)
    if accuracy is None:
        return None
    return {
        "accuracy": accuracy,
        "interval": wilson_interval(accuracy, num),
        "num_pairs": num,
        "num_ties": round(own.get("rewards/ties", 0.0) * num),
    }


def accuracy_of(logs: Mapping[str, float]) -> float | None:
    """How often the chosen response has the larger reward, a tie counting half.

    `rewards/accuracies` is TRL's, for which a tie is a miss.
    """
    accuracy = logs.get("rewards/accuracies")
    return None if accuracy is None else min(1.0, accuracy + logs.get("rewards/ties", 0.0) / 2)
