"""A policy's figures as the page shows them: by metric, side and step; their means and ranges."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenratio.models.token_values import Array
from tokenratio.report.credit_data import SIDES, InspectedPolicy, Inspection, rounded

# Metrics that a method has at every step, by the name in `MethodValues.steps`.
STEP_METRICS = {
    "log_r": "pair_log_ratio",
    "log_w": "log_state_weight",
    "slope": "slope",
    "loss": "loss",
}
# The share of values that have colours of their own; larger ones look like the largest of these.
_COVERED = 0.98
# Values of a metric, pair by pair: by `key` or `method/key`, then by side or "step".
Everywhere = Mapping[str, Mapping[str, Sequence[Array]]]


class PolicyFigures:
    """One policy's figures on all pairs, as the page reads them."""

    def __init__(self, inspection: Inspection, policy: InspectedPolicy) -> None:
        self._inspection, self._policy = inspection, policy

    def margin(self, index: int) -> float:
        """|Σρ chosen − Σρ rejected|."""
        chosen, rejected = self._policy.rewards(index, 1.0)
        return abs(chosen - rejected)

    def of_pair(self, index: int) -> dict[str, Any]:
        """All figures of a pair, by side and by method."""
        found: dict[str, Any] = {
            side: {key: rounded(values) for key, values in of_side.items()}
            for side, of_side in self._tokens(index).items()
        }
        found["methods"] = [
            {
                key: (
                    {side: rounded(each) for side, each in values.items()}
                    if isinstance(values, dict)
                    else rounded(values)
                )
                for key, values in self._method(number, index).items()
            }
            for number in range(len(self._inspection.methods))
        ]
        return found

    def overview(self) -> list[list[Any]]:
        """Of each pair: chosen reward and margin; of each method loss and largest |log R|."""
        rows = []
        for index in range(len(self._inspection.pairs)):
            log_rs = [
                self._method(number, index).get("log_r", [np.nan])
                for number in range(len(self._inspection.methods))
            ]
            peaks = [float(np.abs(log_r).max()) for log_r in log_rs]
            losses = [float(each.loss[index]) for each in self._policy.methods]
            chosen, rejected = self._policy.rewards(index, self._inspection.beta)
            # The difference of rounded rewards can be 0 or have another sign.
            rewards = rounded([chosen, chosen - rejected])
            rows.append([*rewards, rounded(losses), rounded(peaks)])
        return rows

    def everywhere(self) -> Everywhere:
        """Every metric's values on all pairs."""
        found: dict[str, dict[str, list[Array]]] = {}

        def add(place: str, side: str, values: Array) -> None:
            found.setdefault(place, {}).setdefault(side, []).append(values)

        for index, pair in enumerate(self._inspection.pairs):
            for side, of_side in self._tokens(index).items():
                value = getattr(pair, side).value
                known = {} if value is None else {"value": value}
                for key, values in {**of_side, **known}.items():
                    add(key, side, values)
            for number, shown in enumerate(self._inspection.methods):
                for key, of_steps in self._method(number, index).items():
                    by_side = of_steps if isinstance(of_steps, dict) else {"step": of_steps}
                    for side, values in by_side.items():
                        add(f"{shown.name}/{key}", side, values)
        return found

    def _tokens(self, index: int) -> dict[str, dict[str, Array]]:
        found = {}
        for side, of_side in zip(SIDES, self._policy.sides, strict=True):
            values = of_side[index]
            assert values.predictions is not None
            assert values.kl_ref_policy is not None
            found[side] = {
                "rho": values.log_ratio,
                "kl": values.kl_ref_policy,
                "entropy": values.predictions.entropy.double().numpy(),
                "ref": values.ref_log_probs,
            }
        return found

    def _method(self, number: int, index: int) -> dict[str, Any]:
        """Arrays by key, over steps or, for `push`, by side; only those that the method has."""
        values, pair = self._policy.methods[number], self._inspection.pairs[index]
        lengths = [len(getattr(pair, side)) for side in SIDES]
        if not values.steps:
            pushes = zip(SIDES, (values.chosen_push, values.rejected_push), lengths, strict=True)
            return {"push": {side: each[index, :n].numpy() for side, each, n in pushes}}
        length = pair.num_shared if "loss" in values.steps else max(lengths)
        return {
            key: values.steps[name][index, :length].numpy()
            for key, name in STEP_METRICS.items()
            if name in values.steps
        }


def robust_range(place: str, everywhere: Sequence[Everywhere]) -> float:
    """The size that 98 % of a metric's values stay within, the same for all policies."""
    parts = [
        np.abs(values)
        for found in everywhere
        for sides in found.get(place, {}).values()
        for each in sides
        if len(values := each[np.isfinite(each)])
    ]
    if not parts:
        return 0.0
    sizes = np.concatenate(parts)
    covered = float(np.quantile(sizes, _COVERED))
    found = covered if covered > 0 else float(sizes.max())
    return float(f"{found:.2g}")


def by_position(values: Sequence[Array]) -> list[float | None]:
    """The mean at each step, while at least a tenth of the pairs, and two, have it."""
    longest = max(map(len, values))
    table = np.full((len(values), longest), np.nan)
    for row, each in zip(table, values, strict=True):
        row[: len(each)] = each
    counts = np.isfinite(table).sum(0)
    least = max(min(2, len(values)), len(values) / 10)
    sums = np.where(np.isfinite(table), table, 0.0).sum(0)
    means = np.where(counts >= least, sums / np.maximum(counts, 1), np.nan)
    last = np.flatnonzero(np.isfinite(means))
    return rounded(means[: last[-1] + 1] if len(last) else [])
