"""Losses of averages over whole responses, and cross-entropy."""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from tokenratio.bregman import Logistic
from tokenratio.losses.ratio_matching import ratio_matching_loss
from tokenratio.types import PairStatistics, ResponseStatistics


def sft_loss(
    log_probs: Float[Tensor, "rows steps"], mask: Bool[Tensor, "rows steps"]
) -> Float[Tensor, "rows"]:
    """Cross-entropy: −Σ_t log π(y_t|s_t) of each response, in nats.

    Divided by the tokens of the batch, its sum is the mean that transformers' models return.

    Args:
        log_probs: any value, even NaN, where the mask is False.
    """
    return -log_probs.masked_fill(~mask, 0.0).sum(-1)


def anchor_loss(
    log_probs: Float[Tensor, "pairs steps"], mask: Bool[Tensor, "pairs steps"]
) -> Float[Tensor, "pairs"]:
    """The chosen response's cross-entropy per token: the NLL term of RPO (arXiv 2404.19733, eq. 1).

    With a weight it is added to a preference loss to keep the chosen response likely.
    """
    return sft_loss(log_probs, mask) / mask.sum(-1).clamp_min(1)


def ipo_loss(
    chosen_log_ratio: Float[Tensor, "pairs"],
    rejected_log_ratio: Float[Tensor, "pairs"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "pairs"]:
    r"""IPO: (ρ^w − ρ^l − 1/(2β))² (arXiv 2310.12036, eq. 17; docs/method.md §6).

    Args:
        chosen_log_ratio: the response's log-ratio per token, Σ_t ρ_t / |y|, in nats: averages
            rather than the paper's sums, as its authors advised later and TRL does.
        beta: the paper's τ, > 0: the target margin is 1/(2β).
        label_smoothing: ε in [0, 1/2): the mixture with the loss of the swapped pair.
    """
    margin = chosen_log_ratio - rejected_log_ratio
    loss = (margin - 1 / (2 * beta)).square()
    if label_smoothing:
        flipped = (margin + 1 / (2 * beta)).square()
        loss = (1 - label_smoothing) * loss + label_smoothing * flipped
    return loss


def simpo_loss(
    chosen_log_prob: Float[Tensor, "pairs"],
    rejected_log_prob: Float[Tensor, "pairs"],
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "pairs"]:
    r"""SimPO: −log σ(β (p^w − p^l) − γ), p the mean log-probability (arXiv 2405.14734, eq. 6).

    Args:
        chosen_log_prob, rejected_log_prob: Σ_t log π(y_t|s_t) / |y|, in nats per token.
        beta: scale of the reward, > 0.
        gamma: the target margin, ≥ 0, in units of the reward.
        label_smoothing: ε in [0, 1/2): the mixture with the loss at the negated argument, as TRL's.
    """
    return ratio_matching_loss(
        beta * (rejected_log_prob - chosen_log_prob) + gamma,
        generator=Logistic(),
        label_smoothing=label_smoothing,
    )


def _per_token(
    side: ResponseStatistics, values: Float[Tensor, "pairs steps"]
) -> Float[Tensor, "pairs"]:
    return values.sum(-1) / side.lengths.clamp_min(1)


def sft_of_pair(pair: PairStatistics) -> Float[Tensor, "pairs"]:
    """`sft_loss` of the chosen responses."""
    return sft_loss(pair.chosen.log_probs, pair.chosen.mask)


def ipo_of_pair(pair: PairStatistics, **settings: Any) -> Float[Tensor, "pairs"]:
    """`ipo_loss` of the mean log-ratios."""
    sides = (pair.chosen, pair.rejected)
    return ipo_loss(*(_per_token(side, side.log_ratio) for side in sides), **settings)


def simpo_of_pair(
    pair: PairStatistics, *, simpo_gamma: float, **settings: Any
) -> Float[Tensor, "pairs"]:
    """`simpo_loss` of the mean log-probabilities."""
    sides = (pair.chosen, pair.rejected)
    means = (_per_token(side, side.log_probs) for side in sides)
    return simpo_loss(*means, gamma=simpo_gamma, **settings)
