"""Credit assignment: a policy's token scores compared with the true token advantages.

A policy's score of a token is β (ρ_t + state term), ρ_t its log-ratio to the reference: with
KL(π_ref ‖ π) as state term it estimates A_ref (TBPO-A), with the learned baseline Q_ref (TBPO-Q),
docs/method.md §1. Scores are compared by rank, so that neither β nor a method's scale matters.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from scipy import stats
from torch import Tensor, nn

from tokenratio.errors import TokenRatioError
from tokenratio.models.token_rows import TokenRow
from tokenratio.models.token_values import Array, TokenValues, token_values

StateTerm = Literal["none", "kl", "baseline"]


@dataclass(frozen=True)
class Correlation:
    """A rank correlation in [−1, 1] and its uncertainty.

    Attributes:
        value: nan if it is not defined (all scores equal, as before training).
        standard_error: from a bootstrap over prompts; nan for one prompt.
        low, high: the bootstrap's 95 % percentile interval.
    """

    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class Credit:
    """Rank correlations of predicted and true token scores.

    Attributes:
        spearman, kendall: over the tokens of all responses together (ties: average ranks, τ-b).
        spearman_within, kendall_within: within each response, then the mean over responses.
        num_tokens, num_responses, num_prompts: what was compared.
        num_unknown_tokens: tokens left out because their true score is not known (nan).
        num_constant_responses: left out of `…_within`: responses with fewer than two tokens, or
            with all predicted or all true scores equal.
    """

    spearman: Correlation
    kendall: Correlation
    spearman_within: Correlation
    kendall_within: Correlation
    num_tokens: int
    num_responses: int
    num_prompts: int
    num_unknown_tokens: int
    num_constant_responses: int


def credit(
    predicted: Sequence[Sequence[float] | Array],
    gold: Sequence[Sequence[float] | Array],
    prompts: Sequence[Hashable],
    *,
    num_bootstrap: int = 500,
    seed: int = 0,
) -> Credit:
    """Compare predicted with true scores, token by token.

    Args:
        predicted: for each response, a score of each token.
        gold: the true scores, in the same shape; nan where a token has none.
        prompts: of each response; the bootstrap draws responses to one prompt together.
        num_bootstrap: resamples of the prompts.
        seed: of the resamples.
    Raises:
        TokenRatioError: lengths differ, a predicted score is not finite, or no token has a true
            score; names the response by its index, from 0.
    """
    pairs = [_aligned(*sides) for sides in enumerate(zip(predicted, gold, strict=True))]
    if len(prompts) != len(pairs):
        raise TokenRatioError(f"{len(pairs)} responses, but {len(prompts)} prompts")
    known = [pair[:, ~np.isnan(pair[1])] for pair in pairs]
    num_tokens = sum(pair.shape[1] for pair in known)
    if not num_tokens:
        raise TokenRatioError("no token has a true score: there is nothing to compare with")
    within = np.array([_correlations(*pair) for pair in known])

    of_prompt: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        of_prompt.setdefault(prompt, []).append(index)
    clusters = list(of_prompt.values())

    def statistics(drawn: Iterable[int]) -> Array:
        responses = [index for cluster in drawn for index in clusters[cluster]]
        pooled = _correlations(*np.concatenate([known[i] for i in responses], axis=1))
        return np.array([*pooled, *_nanmean(within[responses])])

    rng = np.random.default_rng(seed)
    values, resampled = statistics(range(len(clusters))), np.empty((0, 4))
    if len(clusters) > 1 and num_bootstrap:
        draws = rng.integers(len(clusters), size=(num_bootstrap, len(clusters)))
        resampled = np.array([statistics(draw) for draw in draws])
    spearman, kendall, spearman_within, kendall_within = (
        _correlation(*column) for column in zip(values, resampled.T, strict=True)
    )
    return Credit(
        spearman,
        kendall,
        spearman_within,
        kendall_within,
        num_tokens=num_tokens,
        num_responses=len(pairs),
        num_prompts=len(clusters),
        num_unknown_tokens=sum(pair.shape[1] for pair in pairs) - num_tokens,
        num_constant_responses=int(np.isnan(within[:, 0]).sum()),
    )


def token_scores(
    model: nn.Module,
    ref_model: nn.Module | None,
    responses: Sequence[TokenRow],
    *,
    beta: float,
    state_term: StateTerm,
    baseline: Callable[[Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens"]] | None = None,
    batch_size: int = 16,
) -> list[Array]:
    """β (ρ_t + state term) of each token of each response, in the unit of the reward.

    Args:
        ref_model: π_ref; None for a model with a PEFT adapter, which is then switched off.
        beta: that the policy was trained with, > 0.
        state_term: `"kl"` adds KL(π_ref ‖ π) of the state, `"baseline"` adds b(s).
        baseline: b, from the policy's hidden states (`models.state_baseline.StateBaseline`).
        batch_size: rows in one forward pass.
    Returns:
        One array per response, in the order given, a value per token, EOS included.
    Raises:
        TokenRatioError: β ≤ 0, a missing baseline, a missing adapter, or what `score_rows` refuses.
    """
    (scores,) = scores_by_term(
        model,
        ref_model,
        responses,
        beta=beta,
        state_terms=[state_term],
        baseline=baseline,
        batch_size=batch_size,
    )
    return scores


def scores_by_term(
    model: nn.Module,
    ref_model: nn.Module | None,
    responses: Sequence[TokenRow],
    *,
    beta: float,
    state_terms: Sequence[StateTerm],
    baseline: Callable[[Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens"]] | None = None,
    batch_size: int = 16,
) -> list[list[Array]]:
    """`token_scores` with each of several state terms, from one pass of both models."""
    if not (math.isfinite(beta) and beta > 0):
        raise TokenRatioError(f"beta must be positive and finite, not {beta}")
    if ("baseline" in state_terms) != (baseline is not None):
        raise TokenRatioError(
            "the state term 'baseline' needs a baseline; the others do not take one"
        )
    found = token_values(
        model,
        ref_model,
        responses,
        with_kl="kl" in state_terms,
        baseline=baseline,
        batch_size=batch_size,
    )

    def score(values: TokenValues, term: StateTerm) -> Array:
        added = {"none": 0.0, "kl": values.kl_ref_policy, "baseline": values.baseline}[term]
        assert added is not None
        return beta * (values.log_ratio + added)

    return [[score(values, term) for values in found] for term in state_terms]


def _aligned(index: int, sides: tuple[Any, Any]) -> Array:
    """[2, tokens]: predicted, true."""
    predicted, gold = (np.asarray(side, dtype=np.float64) for side in sides)
    if predicted.ndim != 1 or predicted.shape != gold.shape:
        raise TokenRatioError(
            f"response {index}: {predicted.shape} predicted scores, {gold.shape} true ones; both "
            "must have one per token"
        )
    if not np.isfinite(predicted).all():
        raise TokenRatioError(f"response {index}: a predicted score is not finite")
    return np.stack([predicted, gold])


def _correlations(predicted: Array, gold: Array) -> tuple[float, float]:
    """Spearman's ρ with average ranks, Kendall's τ-b; nan where either side is constant."""
    if len(gold) < 2 or not np.ptp(predicted) or not np.ptp(gold):
        return math.nan, math.nan
    spearman = stats.spearmanr(predicted, gold).statistic
    # Only the p-value, which is not used, depends on the method: exact is slow, and asymptotic
    # divides by zero for two tokens.
    method = "asymptotic" if len(gold) > 2 else "exact"
    kendall = stats.kendalltau(predicted, gold, method=method).statistic
    return float(spearman), float(kendall)


def _nanmean(values: Array) -> Array:
    """Mean of each column over the rows that are not nan; nan if there are none."""
    defined = values[~np.isnan(values[:, 0])]
    return defined.mean(0) if len(defined) else np.full(values.shape[1], math.nan)


def _correlation(value: float, resampled: Array) -> Correlation:
    resampled = resampled[~np.isnan(resampled)]  # a resample of one prompt alone may be constant
    if math.isnan(value) or len(resampled) < 2:
        return Correlation(float(value), math.nan, math.nan, math.nan)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Correlation(float(value), float(resampled.std(ddof=1)), float(low), float(high))
