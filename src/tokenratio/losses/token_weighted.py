"""Losses of whole responses whose tokens count differently: weighted, selected, tied, in chunks.

The *contrast* of a token is log p₊(y_t) − log p₋(y_t): how much likelier it is to one of two
models, or after one of two prompts. It is computed before training. TIS-DPO, SePO and T-REG all
read it and differ in what they do with it.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenratio.bregman import BregmanGenerator, Logistic
from tokenratio.losses.ratio_matching import ratio_matching_loss
from tokenratio.losses.sequence import simpo_loss
from tokenratio.types import PairStatistics, ResponseStatistics

_LARGEST_EXPONENT = 30.0  # ARC-BPO's released code clips a chunk's log-ratio and target there


def _contrast(side: ResponseStatistics) -> Float[Tensor, "pairs steps"]:
    if side.contrast is None:
        raise ValueError("this loss needs the tokens' contrast: see `tokenratio score-tokens`")
    return side.contrast


def tis_weights(
    contrast: Float[Tensor, "pairs steps"], *, sign: int, lower: float, upper: float
) -> Float[Tensor, "pairs steps"]:
    r"""TIS-DPO's weight of each token, exp(±clamp(log π₊/π₋, L, U)) (arXiv 2410.04350, §4.2).

    The paper's k and |μ| are 1 and left out. Its released code weights tokens by rank within the
    response instead; this follows the paper's formula. L = −0.5 and U = 1.5 could not be checked
    against the paper's text.

    Args:
        contrast: log π₊ − log π₋ of two contrasting models, in nats; the published ones are DPO on
            the pairs and DPO on the pairs swapped.
        sign: 1 for chosen tokens, −1 for rejected ones.
        lower: L; `upper` is U, in nats.
    """
    return (sign * contrast.clamp(lower, upper)).exp()


def tis_dpo_loss(
    chosen_log_ratio: Float[Tensor, "pairs steps"],
    rejected_log_ratio: Float[Tensor, "pairs steps"],
    chosen_weight: Float[Tensor, "pairs steps"],
    rejected_weight: Float[Tensor, "pairs steps"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "pairs"]:
    r"""TIS-DPO: −log σ(β (Σ_t w_t ρ_t^w − Σ_t w_t ρ_t^l)) (arXiv 2410.04350, eq. 11).

    The term η, a weighted KL, is left out: the released code turns it off, and the paper reports
    that it changes little.

    Args:
        chosen_log_ratio, rejected_log_ratio: ρ_t in nats, 0 past the response's end.
        chosen_weight, rejected_weight: w_t ≥ 0; all 1 is DPO.
    """
    chosen = (chosen_weight * chosen_log_ratio).sum(-1)
    rejected = (rejected_weight * rejected_log_ratio).sum(-1)
    return ratio_matching_loss(
        beta * (rejected - chosen), generator=Logistic(), label_smoothing=label_smoothing
    )


def tis_dpo_of_pair(
    pair: PairStatistics, *, tis_lower: float, tis_upper: float, **settings: Any
) -> Float[Tensor, "pairs"]:
    """`tis_dpo_loss` with the weights that the contrast gives."""
    chosen, rejected = pair.chosen, pair.rejected
    weights = (
        tis_weights(_contrast(side), sign=sign, lower=tis_lower, upper=tis_upper)
        for side, sign in ((chosen, 1), (rejected, -1))
    )
    return tis_dpo_loss(chosen.log_ratio, rejected.log_ratio, *weights, **settings)


def sepo_selection(
    score: Float[Tensor, "pairs steps"], mask: Bool[Tensor, "pairs steps"], *, share: float
) -> Bool[Tensor, "pairs steps"]:
    """True for the ⌊share · |y|⌋ tokens of each response with the largest score, at least one.

    The released code selects no token of a very short response; one is kept here, so that every
    pair has a loss. Ties go to the earlier token.

    Args:
        score: what to select by; any value where the mask is False.
        share: in (0, 1].
    """
    lengths = mask.sum(-1)
    # A share of 0.3 of 10 tokens is 3, not the 2 that 2.9999... would be.
    wanted = (lengths.double() * share + 1e-6).floor().long().clamp_min(1)
    candidates = score.masked_fill(~mask, -math.inf)
    order = candidates.argsort(dim=-1, descending=True, stable=True)
    rank: Tensor = order.argsort(-1)
    return (rank < wanted[:, None]) & mask


def sepo_loss(
    chosen_log_probs: Float[Tensor, "pairs steps"],
    rejected_log_probs: Float[Tensor, "pairs steps"],
    chosen_selected: Bool[Tensor, "pairs steps"],
    rejected_selected: Bool[Tensor, "pairs steps"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "pairs"]:
    r"""SePO: −log σ(γ (p^w − p^l)), p the mean log π(y_t|s_t) of the selected (2408.13518, eq. 11).

    The selected tokens are those with the most extreme reward log π_oracle/π_ref of an oracle: the
    top k % of the chosen response and the bottom k % of the rejected one. With all tokens selected
    it is SimPO without a margin.

    Args:
        chosen_log_probs, rejected_log_probs: log π(y_t|s_t) in nats.
        chosen_selected: from `sepo_selection`; at least one token a response.
        beta: the paper's γ, > 0, searched between 2.1 and 2.5; its released code uses 1.
    """

    def mean(log_probs: Tensor, selected: Tensor) -> Tensor:
        return log_probs.masked_fill(~selected, 0.0).sum(-1) / selected.sum(-1).clamp_min(1)

    return simpo_loss(
        mean(chosen_log_probs, chosen_selected),
        mean(rejected_log_probs, rejected_selected),
        beta=beta,
        gamma=0.0,
        label_smoothing=label_smoothing,
    )


def sepo_of_pair(
    pair: PairStatistics, *, sepo_share: float, **settings: Any
) -> Float[Tensor, "pairs"]:
    """`sepo_loss` of the top chosen and the bottom rejected tokens by contrast."""
    chosen, rejected = pair.chosen, pair.rejected
    selected = (
        sepo_selection(sign * _contrast(side), side.mask, share=sepo_share)
        for side, sign in ((chosen, 1), (rejected, -1))
    )
    return sepo_loss(chosen.log_probs, rejected.log_probs, *selected, **settings)


def t_reg_loss(
    chosen_log_probs: Float[Tensor, "pairs steps"],
    rejected_log_probs: Float[Tensor, "pairs steps"],
    chosen_log_ratio: Float[Tensor, "pairs steps"],
    rejected_log_ratio: Float[Tensor, "pairs steps"],
    chosen_contrast: Float[Tensor, "pairs steps"],
    rejected_contrast: Float[Tensor, "pairs steps"],
    *,
    beta: float,
    weight: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "pairs"]:
    r"""T-REG: DPO − α w β Σ_t r_t log π(y_t|s_t), over both responses (arXiv 2412.02685, §4).

    r_t = σ(contrast) − 1/2 is the token's reward from contrastive prompting, and w = σ(−β(Σρ^w −
    Σρ^l)) the pair's weight in DPO's gradient. w is held constant, as its derivation implies; this
    could not be checked against the paper's code.

    Args:
        chosen_log_probs: log π(y_t|s_t) in nats, 0 past the response's end, like all the others.
        chosen_contrast: log π_ref(y_t | better prompt) − log π_ref(y_t | worse prompt), in nats.
        weight: α ≥ 0, searched by the paper among 0.1, 0.25 and 0.5; 0 is DPO.
    """
    log_ratio = beta * (rejected_log_ratio.sum(-1) - chosen_log_ratio.sum(-1))
    pair_weight = log_ratio.detach().sigmoid()
    tied = sum(
        ((contrast.sigmoid() - 0.5) * log_probs).sum(-1)
        for contrast, log_probs in (
            (chosen_contrast, chosen_log_probs),
            (rejected_contrast, rejected_log_probs),
        )
    )
    dpo = ratio_matching_loss(log_ratio, generator=Logistic(), label_smoothing=label_smoothing)
    return dpo - weight * pair_weight * beta * tied


def t_reg_of_pair(
    pair: PairStatistics, *, t_reg_weight: float, **settings: Any
) -> Float[Tensor, "pairs"]:
    """`t_reg_loss` with the contrast as both responses' token rewards."""
    sides = (pair.chosen, pair.rejected)
    return t_reg_loss(
        *(side.log_probs for side in sides),
        *(side.log_ratio for side in sides),
        *(_contrast(side) for side in sides),
        weight=t_reg_weight,
        **settings,
    )


def chunk_sums(
    per_token: Float[Tensor, "rows steps"], mask: Bool[Tensor, "rows steps"], *, chunk_length: int
) -> tuple[Float[Tensor, "rows chunks"], Float[Tensor, "rows"]]:
    """Sums over chunks: each response in ⌈|y| / chunk_length⌉ runs of equal length, to one token.

    Returns:
        The sums, 0 for chunks that a response does not have, and its number of chunks.
    """
    lengths = mask.sum(-1, keepdim=True)
    counts = -(-lengths // chunk_length)
    steps = torch.arange(per_token.shape[-1], device=per_token.device)
    chunk = torch.where(mask, steps * counts // lengths.clamp_min(1), 0)
    width = max(1, -(-per_token.shape[-1] // chunk_length))
    sums = per_token.new_zeros(len(per_token), width)
    return sums.scatter_add(-1, chunk, per_token.masked_fill(~mask, 0.0)), counts.squeeze(-1).to(
        per_token.dtype
    )


def arc_bpo_loss(
    chosen_log_ratio: Float[Tensor, "pairs steps"],
    rejected_log_ratio: Float[Tensor, "pairs steps"],
    chosen_mask: Bool[Tensor, "pairs steps"],
    rejected_mask: Bool[Tensor, "pairs steps"],
    *,
    beta: float,
    generator: BregmanGenerator,
    chunk_length: int,
    target_margin: float,
) -> Float[Tensor, "pairs"]:
    r"""ARC-BPO: each chunk's reward is pulled to a target of its own (docs/method.md §11).

    The target of a_i = β Σ_{t in chunk i} ρ_t is τ_i = Δ/(2m) in a chosen response of m chunks and
    −Δ/(2n) in a rejected one of n, so that they add up to the margin Δ; the loss is the
    Bregman divergence h(e^{−τ}) − h(e^{−a}) − h'(e^{−a}) (e^{−τ} − e^{−a}), a mean over the chunks
    of each side and the sum of both (github.com/Thang1703hrsh/ARC-BPO, its specification). The
    targets have its default, uniform shape. Its chunks end at punctuation; ours have equal lengths,
    which needs no text. One chunk per response compares whole responses with ±Δ/2. As published,
    |a| is clipped at 30, where the gradient is 0; λ ≥ 2 overflows float32 before that.

    Args:
        chosen_log_ratio: ρ_t in nats; any value where the mask is False.
        generator: h; published is SBA with λ = 1, s = 4.
        chunk_length: longest chunk in tokens, published 4 to 64.
        target_margin: Δ > 0, in units of the reward; published 2.0 and 2.5.
    """

    def one_sided(log_ratio: Tensor, mask: Tensor, margin: float) -> Tensor:
        sums, counts = chunk_sums(log_ratio, mask, chunk_length=chunk_length)
        present = torch.arange(sums.shape[-1], device=sums.device) < counts[:, None]
        target = (margin / counts.clamp_min(1))[:, None].expand_as(sums)
        reward = (beta * sums).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        goal, ratio = (-target).exp(), (-reward).exp()
        divergence = (
            generator.h(goal) - generator.h(ratio) - generator.h_prime(ratio) * (goal - ratio)
        )
        return divergence.masked_fill(~present, 0.0).sum(-1) / counts.clamp_min(1)

    half = target_margin / 2
    return one_sided(chosen_log_ratio, chosen_mask, half) + one_sided(
        rejected_log_ratio, rejected_mask, -half
    )


def arc_bpo_of_pair(
    pair: PairStatistics, *, arc_chunk_length: int, arc_target_margin: float, **settings: Any
) -> Float[Tensor, "pairs"]:
    """`arc_bpo_loss` of both responses."""
    sides = (pair.chosen, pair.rejected)
    return arc_bpo_loss(
        *(side.log_ratio for side in sides),
        *(side.mask for side in sides),
        chunk_length=arc_chunk_length,
        target_margin=arc_target_margin,
        **settings,
    )
