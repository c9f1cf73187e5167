"""Pairs under policies and a reference, token by token, and their figures as JSON."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenratio.errors import reported_as
from tokenratio.evaluation.results import without_nan
from tokenratio.models.token_rows import TokenRow
from tokenratio.models.token_values import Array, TokenValues
from tokenratio.report.credit_methods import MethodValues, ShownMethod
from tokenratio.report.credit_places import require_own_figures
from tokenratio.report.credit_text import TokenText, TokenTexts
from tokenratio.run_folder import replace_text
from tokenratio.types import PairStatistics, ResponseStatistics

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class InspectedSide:
    """One response of a pair.

    Attributes:
        tokens: as they are shown; the ids are those of `row`.
        cut: tokens left out at the end, by max_length.
        value: what a world knows of each token; None without such a world.
    """

    row: TokenRow
    tokens: Sequence[TokenText]
    cut: int
    value: Array | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class InspectedPair:
    """What of a pair depends on no policy.

    Attributes:
        origin: its place in the data.
        title: the lines of its prompt that are not those of every prompt, without special tokens.
        prompt: its text, special tokens included.
        prompt_cut: tokens of the prompt left out at its beginning.
    """

    origin: str
    title: str
    prompt: str
    prompt_cut: int
    chosen: InspectedSide
    rejected: InspectedSide

    @property
    def num_shared(self) -> int:
        """T, the steps at which both responses have a token."""
        return min(len(self.chosen), len(self.rejected))

    @property
    def divergence(self) -> int:
        """The first step at which the responses differ; T if one is the beginning of the other."""
        ids = zip(self.chosen.row.response_ids, self.rejected.row.response_ids, strict=False)
        return next((t for t, (one, other) in enumerate(ids) if one != other), self.num_shared)


@dataclass(frozen=True)
class InspectedPolicy:
    """One policy on all pairs.

    Attributes:
        chosen, rejected: what it and the reference say of each token, pair by pair.
        methods: what each method makes of that, in the order of `Inspection.methods`.
    """

    name: str
    chosen: Sequence[TokenValues]
    rejected: Sequence[TokenValues]
    methods: Sequence[MethodValues]

    def rewards(self, pair: int, beta: float) -> tuple[float, float]:
        """β Σρ of the chosen and the rejected response."""
        one, other = (beta * float(side[pair].log_ratio.sum()) for side in self.sides)
        return one, other

    @property
    def sides(self) -> tuple[Sequence[TokenValues], Sequence[TokenValues]]:
        """Chosen, rejected."""
        return self.chosen, self.rejected


@dataclass(frozen=True)
class Inspection:
    """Preference pairs under one or more policies and their reference.

    Attributes:
        reference, source: names of the reference and of the data.
        beta: scale of the rewards β Σρ.
        value_name: what `InspectedSide.value` is, in words; None if nothing is known.
        notes: for the reader.
    """

    reference: str
    source: str
    beta: float
    pairs: Sequence[InspectedPair]
    methods: Sequence[ShownMethod]
    policies: Sequence[InspectedPolicy]
    texts: TokenTexts
    value_name: str | None = None
    notes: Sequence[str] = field(default_factory=list)

    def records(self) -> Iterator[dict[str, Any]]:
        """One object for each pair and policy, as `--jsonl` writes them."""
        for policy in self.policies:
            for index in range(len(self.pairs)):
                yield self._record(policy, index)

    def write_jsonl(self, path: str | Path) -> None:
        """Write `records` as JSON lines; null stands for what is not known or not finite.

        Raises:
            TokenRatioError: it would replace a file that holds no figures, or cannot be written.
        """
        lines = (json.dumps(without_nan(each), ensure_ascii=False) for each in self.records())
        require_own_figures(Path(path))
        with reported_as(f"cannot write {path}", OSError):
            replace_text(Path(path), "".join(f"{line}\n" for line in lines))

    def _record(self, policy: InspectedPolicy, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        chosen, rejected = policy.rewards(index, self.beta)
        found: dict[str, Any] = {
            "pair": index,
            "origin": pair.origin,
            "policy": policy.name,
            "prompt": pair.prompt,
            "prompt_cut": pair.prompt_cut,
            "num_shared": pair.num_shared,
            "divergence": pair.divergence,
            "beta": self.beta,
            "rewards": {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected},
        }
        for side, values in zip(SIDES, policy.sides, strict=True):
            found[side] = self._side(getattr(pair, side), values[index])
        found["methods"] = {
            shown.name: _method(values, index, pair)
            for shown, values in zip(self.methods, policy.methods, strict=True)
        }
        return found

    def _side(self, side: InspectedSide, values: TokenValues) -> dict[str, Any]:
        predicted = values.predictions
        assert predicted is not None
        return {
            "ids": list(side.row.response_ids),
            "tokens": [token.text for token in side.tokens],
            "kinds": [token.kind for token in side.tokens],
            "cut": side.cut,
            "log_probs": values.log_probs.tolist(),
            "ref_log_probs": values.ref_log_probs.tolist(),
            "log_ratio": values.log_ratio.tolist(),
            "kl_ref_policy": None
            if values.kl_ref_policy is None
            else values.kl_ref_policy.tolist(),
            "entropy": predicted.entropy.double().tolist(),
            "value": None if side.value is None else side.value.tolist(),
            "alternatives": [
                [
                    {"id": id, "token": self.texts.of_token(id), "log_prob": p, "ref_log_prob": q}
                    for id, p, q in likeliest
                ]
                for likeliest in alternatives(values)
            ],
        }


def alternatives(values: TokenValues) -> list[list[tuple[int, float, float]]]:
    """At each token the likeliest of either model, once each: id, log π, log π_ref, by log π."""
    predicted = values.predictions
    assert predicted is not None
    columns = (predicted.ids, predicted.log_probs, predicted.ref_log_probs)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    found = [{id: (id, p, q) for id, p, q in zip(*row, strict=True)} for row in rows]
    return [sorted(each.values(), key=lambda entry: -entry[1]) for each in found]


def _method(values: MethodValues, index: int, pair: InspectedPair) -> dict[str, Any]:
    longest = max(len(pair.chosen), len(pair.rejected))
    is_local = "loss" in values.steps
    length = pair.num_shared if is_local else longest
    return {
        "loss": float(values.loss[index]),
        "steps": {name: each[index, :length].tolist() for name, each in values.steps.items()},
        "push": {
            "chosen": values.chosen_push[index, : len(pair.chosen)].tolist(),
            "rejected": values.rejected_push[index, : len(pair.rejected)].tolist(),
        },
    }


def pair_statistics(
    chosen: Sequence[TokenValues], rejected: Sequence[TokenValues]
) -> PairStatistics:
    """The pairs as losses read them, without a learned state weight, in float64."""
    longest = max(len(values.log_probs) for values in (*chosen, *rejected))

    def side(values: Sequence[TokenValues]) -> ResponseStatistics:
        return ResponseStatistics(
            padded([each.log_probs for each in values], longest),
            padded([np.ones(len(each.log_probs)) for each in values], longest).bool(),
            padded([each.ref_log_probs for each in values], longest),
            padded([each.kl_ref_policy for each in values], longest),
        )

    return PairStatistics(side(chosen), side(rejected))


def padded(arrays: Sequence[Array | None], longest: int) -> Tensor:
    """Rows of different lengths as one array, 0 past their ends; float64 [rows, longest]."""
    rows = torch.zeros(len(arrays), longest, dtype=torch.float64)
    for row, array in zip(rows, arrays, strict=True):
        if array is not None:
            row[: len(array)] = torch.from_numpy(array)
    return rows


def rounded(values: Sequence[float] | Array | Tensor, *, digits: int = 3) -> list[float | None]:
    """Figures with few digits, for a page: whole if large, `digits` significant ones if small."""
    return [_rounded(float(value), digits) for value in values]


def _rounded(value: float, digits: int) -> float | None:
    if not math.isfinite(value):
        return None
    # Decimals that show a thousandth, or the first digits of what is smaller.
    short = float(f"{value:.{digits}g}") if abs(value) < 1 else round(value, digits)
    return int(short) if short == int(short) else short
