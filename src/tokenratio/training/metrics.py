"""Metrics as sums and counts, added up over batches, accumulation and processes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from tokenratio.records import read_record

# Whether greater is better; None if that depends on the aim.
GREATER_IS_BETTER: dict[str, bool | None] = {
    "loss": False,
    "rewards/chosen": True,
    "rewards/rejected": False,
    "rewards/margins": True,
    "rewards/accuracies": True,
    "rewards/ties": False,
    "logps/chosen": True,
    "logps/rejected": False,
    "log_ratio/chosen": True,
    "log_ratio/mean": None,
    "log_ratio/max_abs": False,
    "kl_ref_policy": False,
    "sft_anchor": False,
    "state_weight/mean": None,
    "state_weight/std": None,
    "state_weight/clamped": False,
    "tokens/past_shorter": None,
}


def greater_is_better(metric: str) -> bool | None:
    """Whether higher is better for a metric; None if neither direction always is.

    Args:
        metric: its name, with or without `eval_` and the name of a held-out set in front.
    """
    name = metric.removeprefix("eval_")
    # The longest match: a set may have any name.
    for known in sorted(GREATER_IS_BETTER, key=len, reverse=True):
        if name == known or name.endswith(f"_{known}"):
            return GREATER_IS_BETTER[known]
    return True  # an unknown metric is refused elsewhere


@dataclass(frozen=True)
class ExampleMetrics:
    """The metrics of a batch: for each metric a numerator and a count per example.

    A peak has no count; its largest value is kept.
    """

    ratios: dict[str, tuple[Float[Tensor, "examples"], Float[Tensor, "examples"]]]
    peaks: dict[str, Float[Tensor, "examples"]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names that `MetricSums.means` reports."""
        one = torch.ones(1)
        sums = MetricSums()
        ratios = dict.fromkeys(self.ratios, (one, one))
        sums.add(ExampleMetrics(ratios, dict.fromkeys(self.peaks, one)))
        return list(sums.means())

    def table(self) -> Float[Tensor, "examples columns"]:
        """All columns as one float64 array, to gather over processes; see `add_table`."""
        columns = [value for pair in self.ratios.values() for value in pair]
        return torch.stack([column.double() for column in [*columns, *self.peaks.values()]], dim=1)


def reward_metrics(
    chosen: Float[Tensor, "pairs"], rejected: Float[Tensor, "pairs"]
) -> dict[str, tuple[Tensor, Tensor]]:
    """TRL's metrics of the rewards of pairs, and ties."""
    one, margin = torch.ones_like(chosen), chosen - rejected
    return {
        "rewards/chosen": (chosen, one),
        "rewards/rejected": (rejected, one),
        "rewards/margins": (margin, one),
        "rewards/accuracies": ((margin > 0).to(margin.dtype), one),
        "rewards/ties": ((margin == 0).to(margin.dtype), one),
    }


@dataclass(frozen=True)
class ExampleLosses:
    """The losses of a batch.

    Attributes:
        total: Σ loss · share, which gradients flow from.
        loss: of each example, without gradient; of an SFT row the sum over its tokens.
        metrics: of each example, to be logged.
    """

    total: Float[Tensor, ""]
    loss: Float[Tensor, "examples"]
    metrics: ExampleMetrics


class MetricSums:
    """Running sums of `ExampleMetrics`; `means` gives the values to log."""

    def __init__(self) -> None:
        self.ratios: dict[str, tuple[float, float]] = {}
        self.peaks: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self.ratios)

    def add(self, metrics: ExampleMetrics) -> None:
        """Add a batch, with one transfer from the device."""
        self.add_table(metrics.table().tolist(), list(metrics.ratios), list(metrics.peaks))

    def add_table(self, rows: list[list[float]], ratios: list[str], peaks: list[str]) -> None:
        """Add the rows of an `ExampleMetrics.table` with these metrics as columns."""
        for row in rows:
            for index, name in enumerate(ratios):
                numerator, count = self.ratios.get(name, (0.0, 0.0))
                self.ratios[name] = (numerator + row[2 * index], count + row[2 * index + 1])
            for value, name in zip(row[2 * len(ratios) :], peaks, strict=True):
                self.peaks[name] = max(self.peaks.get(name, value), value)

    def reduce(self, gather: Callable[[list[Any]], list[Any]]) -> "MetricSums":
        """The sums over all processes; `gather` concatenates their lists of objects."""
        total = MetricSums()
        for ratios, peaks in gather([(self.ratios, self.peaks)]):
            for name, (numerator, count) in ratios.items():
                old = total.ratios.get(name, (0.0, 0.0))
                total.ratios[name] = (old[0] + numerator, old[1] + count)
            for name, value in peaks.items():
                total.peaks[name] = max(total.peaks.get(name, value), value)
        return total

    def means(self) -> dict[str, float]:
        """Numerator over count of each metric, the peaks, and standard deviations.

        A metric `name/mean_square` becomes `name/std`, using `name/mean`. Metrics with a count of 0
        are left out.
        """
        means = {name: num / count for name, (num, count) in self.ratios.items() if count}
        for name in [name for name in means if name.endswith("/mean_square")]:
            stem = name.removesuffix("/mean_square")
            variance = means.pop(name) - means[f"{stem}/mean"] ** 2
            means[f"{stem}/std"] = max(variance, 0.0) ** 0.5
        return means | self.peaks

    def to_dict(self) -> dict[str, object]:
        return {"ratios": self.ratios, "peaks": self.peaks}

    @classmethod
    def read(cls, path: Path) -> "MetricSums":
        """The sums in a file of `to_dict`; raises `TokenRatioError` if it is damaged."""
        found, sums = read_record(_Sums, path), cls()
        sums.ratios, sums.peaks = found["ratios"], found["peaks"]
        return sums


class _Sums(TypedDict):
    ratios: dict[str, tuple[float, float]]
    peaks: dict[str, float]
