"""Held-out pairs: how often a reward prefers the chosen response, and how often length does."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.estimates import Estimate, clustered_mean

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PairScores:
    """A reward on a set of pairs. Accuracies lie in [0, 1]; a tie counts half.

    Attributes:
        accuracy: of "the response with the larger reward is chosen".
        margin: reward of the chosen minus that of the rejected response, in the reward's unit.
        longer_wins, shorter_wins: accuracies of "the longer response is chosen" and its opposite.
        over_length: accuracy minus that of the better of the two rules, pair by pair, so that its
            standard error is that of the difference. The rule is picked on the same pairs, which
            biases its accuracy upwards a little.
        better_rule: which of the two that is.
        num_ties: pairs with exactly equal rewards.
        num_equal_length: pairs of equal length.
    """

    accuracy: Estimate
    margin: Estimate
    longer_wins: Estimate
    shorter_wins: Estimate
    over_length: Estimate
    better_rule: Literal["longer", "shorter"]
    num_ties: int
    num_equal_length: int


@dataclass(frozen=True)
class LengthBin:
    """The pairs whose length difference, chosen minus rejected, lies in [shortest, longest]."""

    shortest: float
    longest: float
    scores: PairScores


@dataclass(frozen=True)
class PairReport:
    """A reward on held-out pairs.

    Attributes:
        overall: on all pairs.
        by_subset: by the values of `subsets`, in order of appearance.
        by_length: by quantiles of the length difference, from "chosen much shorter" to "chosen much
            longer"; fewer than `num_bins` if many differences are equal: equal ones share a bin.
    """

    overall: PairScores
    by_subset: dict[str, PairScores]
    by_length: tuple[LengthBin, ...]


def held_out_pairs(
    chosen_rewards: Sequence[float] | Array,
    rejected_rewards: Sequence[float] | Array,
    chosen_lengths: Sequence[float] | Array,
    rejected_lengths: Sequence[float] | Array,
    *,
    subsets: Sequence[str] | None = None,
    prompts: Sequence[Hashable] | None = None,
    num_bins: int = 4,
) -> PairReport:
    """Accuracy and margin of a reward, overall, per subset and by length difference.

    Args:
        chosen_rewards, rejected_rewards: of each pair, such as β Σ_t ρ_t.
        chosen_lengths, rejected_lengths: in any unit, tokens or characters.
        subsets: the name of each pair's subset.
        prompts: of each pair; standard errors take prompts, not pairs, as independent draws. If
            None, every pair has its own.
        num_bins: bins of length difference, with about as many pairs in each.
    Raises:
        TokenRatioError: no pairs, columns differ in length, or a value is not finite; names the
            pair by its index, from 0.
    """
    chosen, rejected, chosen_length, rejected_length = _checked(
        {
            "chosen_rewards": chosen_rewards,
            "rejected_rewards": rejected_rewards,
            "chosen_lengths": chosen_lengths,
            "rejected_lengths": rejected_lengths,
        },
        subsets,
        prompts,
    )
    if num_bins < 1:
        raise TokenRatioError(f"num_bins must be at least 1, not {num_bins}")
    longer = chosen_length - rejected_length
    clusters = range(len(chosen)) if prompts is None else prompts

    def scores(pairs: NDArray[np.intp]) -> PairScores:
        return _scores(chosen[pairs] - rejected[pairs], longer[pairs], [clusters[i] for i in pairs])

    of_subset: dict[str, list[int]] = {}
    for index, subset in enumerate(() if subsets is None else subsets):
        of_subset.setdefault(subset, []).append(index)
    inner = np.quantile(longer, np.arange(1, num_bins) / num_bins)
    bins = np.searchsorted(np.unique(inner), longer, side="left")  # a bin holds its upper edge
    by_length = []
    for each in np.unique(bins):
        pairs = np.flatnonzero(bins == each)
        ends = float(longer[pairs].min()), float(longer[pairs].max())
        by_length.append(LengthBin(*ends, scores(pairs)))
    return PairReport(
        overall=scores(np.arange(len(chosen))),
        by_subset={name: scores(np.array(pairs)) for name, pairs in of_subset.items()},
        by_length=tuple(by_length),
    )


def _scores(margin: Array, longer: Array, clusters: Sequence[Hashable]) -> PairScores:
    correct, longer_wins = shares_won(margin), shares_won(longer)
    better: Literal["longer", "shorter"] = "longer" if longer_wins.mean() >= 0.5 else "shorter"
    rule = longer_wins if better == "longer" else 1 - longer_wins

    def mean(values: Array) -> Estimate:
        return clustered_mean(values.tolist(), clusters)

    return PairScores(
        accuracy=mean(correct),
        margin=mean(margin),
        longer_wins=mean(longer_wins),
        shorter_wins=mean(1 - longer_wins),
        over_length=mean(correct - rule),
        better_rule=better,
        num_ties=int((margin == 0).sum()),
        num_equal_length=int((longer == 0).sum()),
    )


def shares_won(differences: ArrayLike) -> Array:
    """1 where positive, 0 where negative, ½ where 0."""
    return (np.sign(np.asarray(differences, dtype=np.float64)) + 1) / 2


def _checked(
    columns: dict[str, Sequence[float] | Array],
    subsets: Sequence[str] | None,
    prompts: Sequence[Hashable] | None,
) -> list[Array]:
    arrays = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    sizes = {name: len(array) for name, array in arrays.items()}
    for name, column in (("subsets", subsets), ("prompts", prompts)):
        if column is not None:
            sizes[name] = len(column)
    if len({*sizes.values()}) > 1:
        listed = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise TokenRatioError(f"columns differ in length: {listed}; each pair needs one of each")
    for name, array in arrays.items():
        if array.ndim != 1:
            raise TokenRatioError(
                f"{name} has shape {array.shape}: it must have one number per pair"
            )
        if not np.isfinite(array).all():
            index = int(np.flatnonzero(~np.isfinite(array))[0])
            raise TokenRatioError(f"pair {index}: {name} is {array[index]}, not a finite number")
    if not sizes["chosen_rewards"]:
        raise TokenRatioError("no pairs: there is no accuracy to measure")
    return list(arrays.values())
