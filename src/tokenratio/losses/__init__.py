"""Preference losses as pure functions, and the table of methods.

Most methods are points of one small space, generator × state weight × aggregation
(`RatioMatching`); the others are functions of their own. `docs/methods.md` is made from the table.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from tokenratio.bregman import BregmanGenerator, Logistic, ScaledBasu
from tokenratio.losses.method import Method, Need, PairLoss
from tokenratio.losses.ratio_matching import (
    RatioMatching,
    bpo_loss,
    ratio_matching_loss,
    tbpo_loss,
)
from tokenratio.losses.sequence import anchor_loss, dpo_loss, ipo_loss, sft_loss, simpo_loss
from tokenratio.losses.token import (
    arc_bpo_loss,
    sepo_loss,
    sepo_selection,
    t_reg_loss,
    tis_dpo_loss,
    tis_weights,
)
from tokenratio.types import PairStatistics, ResponseStatistics

__all__ = [
    "LOSSES",
    "METHODS",
    "Method",
    "PairLoss",
    "RatioMatching",
    "anchor_loss",
    "arc_bpo_loss",
    "bpo_loss",
    "dpo_loss",
    "ipo_loss",
    "ratio_matching_loss",
    "sepo_loss",
    "sepo_selection",
    "sft_loss",
    "simpo_loss",
    "t_reg_loss",
    "tbpo_loss",
    "tis_dpo_loss",
    "tis_weights",
]

_CONTRAST: frozenset[Need] = frozenset({"ref_log_probs", "contrast"})


def _contrast(side: ResponseStatistics) -> Float[Tensor, "pairs steps"]:
    if side.contrast is None:
        raise ValueError("this loss needs the tokens' contrast: see `tokenratio score-tokens`")
    return side.contrast


def _per_token(
    side: ResponseStatistics, values: Float[Tensor, "pairs steps"]
) -> Float[Tensor, "pairs"]:
    return values.sum(-1) / side.lengths.clamp_min(1)


def _sft(pair: PairStatistics) -> Float[Tensor, "pairs"]:
    return sft_loss(pair.chosen.log_probs, pair.chosen.mask)


def _ipo(pair: PairStatistics, **settings: Any) -> Float[Tensor, "pairs"]:
    sides = (pair.chosen, pair.rejected)
    return ipo_loss(*(_per_token(side, side.log_ratio) for side in sides), **settings)


def _simpo(pair: PairStatistics, *, simpo_gamma: float, **settings: Any) -> Float[Tensor, "pairs"]:
    sides = (pair.chosen, pair.rejected)
    means = (_per_token(side, side.log_probs) for side in sides)
    return simpo_loss(*means, gamma=simpo_gamma, **settings)


def _tis_dpo(
    pair: PairStatistics, *, tis_lower: float, tis_upper: float, **settings: Any
) -> Float[Tensor, "pairs"]:
    chosen, rejected = pair.chosen, pair.rejected
    weights = (
        tis_weights(_contrast(side), sign=sign, lower=tis_lower, upper=tis_upper)
        for side, sign in ((chosen, 1), (rejected, -1))
    )
    return tis_dpo_loss(chosen.log_ratio, rejected.log_ratio, *weights, **settings)


def _sepo(pair: PairStatistics, *, sepo_share: float, **settings: Any) -> Float[Tensor, "pairs"]:
    chosen, rejected = pair.chosen, pair.rejected
    selected = (
        sepo_selection(sign * _contrast(side), side.mask, share=sepo_share)
        for side, sign in ((chosen, 1), (rejected, -1))
    )
    return sepo_loss(chosen.log_probs, rejected.log_probs, *selected, **settings)


def _t_reg(pair: PairStatistics, *, t_reg_weight: float, **settings: Any) -> Float[Tensor, "pairs"]:
    sides = (pair.chosen, pair.rejected)
    return t_reg_loss(
        *(side.log_probs for side in sides),
        *(side.log_ratio for side in sides),
        *(_contrast(side) for side in sides),
        weight=t_reg_weight,
        **settings,
    )


def _arc_bpo(
    pair: PairStatistics,
    *,
    beta: float,
    generator: BregmanGenerator,
    arc_chunk_length: int,
    arc_target_margin: float,
) -> Float[Tensor, "pairs"]:
    return arc_bpo_loss(
        pair.chosen.log_ratio,
        pair.rejected.log_ratio,
        pair.chosen.mask,
        pair.rejected.mask,
        beta=beta,
        generator=generator,
        chunk_length=arc_chunk_length,
        target_margin=arc_target_margin,
    )


# What BPO takes for summaries and benchmarks; larger λ need its clipping of the ratio.
_BOUNDED = ScaledBasu(lam=-0.5)
_SMOOTHED = {"beta": 0.1, "label_smoothing": 0.0}
_TIS, _SEPO = {"tis_lower": -0.5, "tis_upper": 1.5}, {"sepo_share": 0.3}
_ARC = {"arc_chunk_length": 16, "arc_target_margin": 2.0}

# The preference losses by name.
LOSSES: dict[str, Method] = {
    # Token by token: log R_t at every step both responses have.
    "tbpo_a": RatioMatching("TBPO-A, arXiv 2605.12288; docs/method.md §4", "kl", "mean"),
    "tbpo_q": RatioMatching("TBPO-Q, arXiv 2605.12288; docs/method.md §4", "baseline", "mean"),
    "tbpo": RatioMatching("TBPO without state weight; docs/method.md §2", "none", "mean"),
    "adpo": RatioMatching("ADPO, arXiv 2602.09533; docs/method.md §11", "none", "sum", Logistic()),
    # Whole responses: Σ_t log R_t.
    "dpo": RatioMatching("DPO, arXiv 2305.18290, eq. 7", "none", "sequence", Logistic()),
    "robust_dpo": RatioMatching(
        "rDPO, arXiv 2403.00409, eq. 12",
        "none",
        "sequence",
        Logistic(),
        label_smoothing=0.1,
        is_robust=True,
    ),
    "bpo": RatioMatching(
        "BPO, arXiv 2505.19601, SBA",
        "none",
        "sequence",
        default_generator=_BOUNDED,
    ),
    "bpo_a": RatioMatching(
        "BPO on TDPO1's score; docs/method.md §11", "kl", "sequence", default_generator=_BOUNDED
    ),
    "tdpo1": RatioMatching("TDPO1, arXiv 2404.11999, eq. 16", "kl", "sequence", Logistic()),
    "tdpo2": RatioMatching(
        "TDPO2, arXiv 2404.11999, eq. 18", "kl", "sequence", Logistic(), tdpo_alpha=0.5
    ),
    "ipo": PairLoss(_ipo, "IPO, arXiv 2310.12036, eq. 17", "response", _SMOOTHED),
    "simpo": PairLoss(
        _simpo,
        "SimPO, arXiv 2405.14734, eq. 6",
        "response",
        {"beta": 2.0, "label_smoothing": 0.0, "simpo_gamma": 1.0},
        frozenset(),
    ),
    # Whole responses whose tokens count differently.
    "tis_dpo": PairLoss(
        _tis_dpo, "TIS-DPO, arXiv 2410.04350, eq. 11", "token weights", _SMOOTHED | _TIS, _CONTRAST
    ),
    "sepo": PairLoss(
        _sepo,
        "SePO, arXiv 2408.13518, eq. 11",
        "token selection",
        {"beta": 2.5, "label_smoothing": 0.0} | _SEPO,
        _CONTRAST - {"ref_log_probs"},
    ),
    "t_reg": PairLoss(
        _t_reg,
        "T-REG, arXiv 2412.02685",
        "token regulariser",
        _SMOOTHED | {"t_reg_weight": 0.25},
        _CONTRAST,
    ),
    "arc_bpo": PairLoss(
        _arc_bpo,
        "ARC-BPO; docs/method.md §11",
        "chunk",
        {"beta": 0.1, "generator": ScaledBasu(lam=1.0)} | _ARC,
    ),
}
# And cross-entropy on chosen responses, which takes data without rejected ones too.
METHODS = LOSSES | {"sft": PairLoss(_sft, "cross-entropy", "response", {}, frozenset())}
