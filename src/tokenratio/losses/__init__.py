"""Preference losses as pure functions, and the table of methods.

Most methods are a choice of generator, state weight and aggregation (`RatioMatching`); the others
have functions of their own. `docs/methods.md` is made from the table.
"""

from dataclasses import replace

from tokenratio.bregman import Logistic, ScaledBasu
from tokenratio.losses.method import REFERENCE, Method, Need, PairLoss
from tokenratio.losses.ratio_matching import (
    Aggregation,
    RatioMatching,
    StateWeight,
    bpo_loss,
    dpo_loss,
    over_steps,
    ratio_matching_loss,
    tbpo_loss,
)
from tokenratio.losses.sequence import (
    anchor_loss,
    ipo_loss,
    ipo_of_pair,
    sft_loss,
    sft_of_pair,
    simpo_loss,
    simpo_of_pair,
)
from tokenratio.losses.token_weighted import (
    arc_bpo_loss,
    arc_bpo_of_pair,
    sepo_loss,
    sepo_of_pair,
    sepo_selection,
    t_reg_loss,
    t_reg_of_pair,
    tis_dpo_loss,
    tis_dpo_of_pair,
    tis_weights,
)

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
    "over_steps",
    "ratio_matching_loss",
    "sepo_loss",
    "sepo_selection",
    "sft_loss",
    "simpo_loss",
    "t_reg_loss",
    "tbpo_loss",
    "tbpo_variant",
    "tis_dpo_loss",
    "tis_weights",
]

_CONTRAST: frozenset[Need] = frozenset({"contrast"})
_SMOOTHED = {"beta": 0.1, "label_smoothing": 0.0}
_TBPO = _SMOOTHED | {"generator": ScaledBasu()}
# What BPO takes for summaries and benchmarks; larger λ need its clipping of the ratio.
_BPO = _SMOOTHED | {"generator": ScaledBasu(lam=-0.5)}
_LOGISTIC = {"generator": Logistic()}

# The preference losses by name; every default of a method's settings is here.
LOSSES: dict[str, Method] = {
    # Token by token: log R_t at every step both responses have.
    "tbpo_a": RatioMatching(
        tbpo_loss, "TBPO-A, arXiv 2605.12288; docs/method.md §4", "kl", "mean", _TBPO
    ),
    "tbpo_q": RatioMatching(
        tbpo_loss, "TBPO-Q, arXiv 2605.12288; docs/method.md §4", "baseline", "mean", _TBPO
    ),
    "tbpo": RatioMatching(
        tbpo_loss, "TBPO without state weight; docs/method.md §2", "none", "mean", _TBPO
    ),
    "adpo": RatioMatching(
        tbpo_loss,
        "ADPO, arXiv 2602.09533; docs/method.md §11",
        "none",
        "sum",
        _SMOOTHED,
        fixed=_LOGISTIC,
    ),
    # Whole responses: Σ_t log R_t.
    "dpo": RatioMatching(dpo_loss, "DPO, arXiv 2305.18290, eq. 7", "none", "sequence", _SMOOTHED),
    "robust_dpo": RatioMatching(
        dpo_loss,
        "rDPO, arXiv 2403.00409, eq. 12",
        "none",
        "sequence",
        {"beta": 0.1, "label_smoothing": 0.1},
        fixed={"is_robust": True},
    ),
    "bpo": RatioMatching(bpo_loss, "BPO, arXiv 2505.19601, SBA", "none", "sequence", _BPO),
    "bpo_a": RatioMatching(
        bpo_loss, "BPO on TDPO1's score; docs/method.md §11", "kl", "sequence", _BPO
    ),
    "tdpo1": RatioMatching(
        bpo_loss,
        "TDPO1, arXiv 2404.11999, eq. 16",
        "kl",
        "sequence",
        _SMOOTHED,
        fixed=_LOGISTIC,
    ),
    "tdpo2": RatioMatching(
        bpo_loss,
        "TDPO2, arXiv 2404.11999, eq. 18",
        "kl",
        "sequence",
        _SMOOTHED | {"tdpo_alpha": 0.5},
        fixed=_LOGISTIC,
    ),
    "ipo": PairLoss(ipo_of_pair, "IPO, arXiv 2310.12036, eq. 17", "response", _SMOOTHED),
    "simpo": PairLoss(
        simpo_of_pair,
        "SimPO, arXiv 2405.14734, eq. 6",
        "response",
        {"beta": 2.0, "label_smoothing": 0.0, "simpo_gamma": 1.0},
        frozenset(),
    ),
    # Whole responses whose tokens count differently.
    "tis_dpo": PairLoss(
        tis_dpo_of_pair,
        "TIS-DPO, arXiv 2410.04350, eq. 11",
        "token weights",
        _SMOOTHED | {"tis_lower": -0.5, "tis_upper": 1.5},
        REFERENCE | _CONTRAST,
    ),
    "sepo": PairLoss(
        sepo_of_pair,
        "SePO, arXiv 2408.13518, eq. 11",
        "token selection",
        {"beta": 2.5, "label_smoothing": 0.0, "sepo_share": 0.3},
        _CONTRAST,
    ),
    "t_reg": PairLoss(
        t_reg_of_pair,
        "T-REG, arXiv 2412.02685",
        "token regulariser",
        _SMOOTHED | {"t_reg_weight": 0.25},
        REFERENCE | _CONTRAST,
    ),
    "arc_bpo": PairLoss(
        arc_bpo_of_pair,
        "ARC-BPO; docs/method.md §11",
        "chunk",
        {
            "beta": 0.1,
            "generator": ScaledBasu(lam=1.0),
            "arc_chunk_length": 16,
            "arc_target_margin": 2.0,
        },
    ),
}
# And cross-entropy on chosen responses, which also takes data without rejected ones.
METHODS = LOSSES | {"sft": PairLoss(sft_of_pair, "cross-entropy", "response", {}, frozenset())}


def tbpo_variant(state_weight: StateWeight, aggregation: Aggregation) -> RatioMatching:
    """The method that `loss: tbpo` runs with these two settings."""
    tbpo = LOSSES["tbpo"]
    assert isinstance(tbpo, RatioMatching)
    equation = bpo_loss if aggregation == "sequence" else tbpo_loss
    return replace(tbpo, equation=equation, state_weight=state_weight, aggregation=aggregation)
