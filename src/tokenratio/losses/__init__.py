"""Preference losses as pure functions, and the table that says what each needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokenratio.bregman import BregmanGenerator
from tokenratio.losses.sequence import dpo_loss
from tokenratio.losses.tbpo import tbpo_loss
from tokenratio.ratios import kl_state_weight, pair_log_ratio
from tokenratio.types import PairStatistics, StepStatistics

__all__ = ["LOSSES", "Method", "dpo_loss", "tbpo_loss"]


@dataclass(frozen=True)
class Method:
    """A preference loss and what has to be computed for it.

    Attributes:
        per_pair: `(PairStatistics, beta=, generator=) -> [pairs]`, in nats.
        state_weight: what corrects for the two prefixes being different states (METHOD §4).
        source: where it comes from.
        per_step: `(StepStatistics, beta=, generator=) -> [steps]` where `per_pair` is its mean over
            the steps both responses have: such a loss is local to its step (METHOD §5). None for
            one that needs whole responses.
    """

    per_pair: Callable[..., Float[Tensor, "pairs"]]
    state_weight: Literal["none", "kl", "baseline"]
    source: str
    per_step: Callable[..., Float[Tensor, "steps"]] | None = None


def _token_level(
    pair: PairStatistics, *, beta: float, generator: BregmanGenerator
) -> Float[Tensor, "pairs"]:
    log_ratio = pair_log_ratio(
        pair.chosen_log_ratio, pair.rejected_log_ratio, pair.log_state_weight, beta=beta
    )
    return tbpo_loss(log_ratio, pair.pair_mask, generator=generator)


def _step(
    step: StepStatistics, *, beta: float, generator: BregmanGenerator
) -> Float[Tensor, "steps"]:
    if step.log_state_weight is not None:
        log_weight = step.log_state_weight
    elif step.chosen_kl is not None and step.rejected_kl is not None:
        log_weight = kl_state_weight(step.chosen_kl, step.rejected_kl)
    else:
        log_weight = torch.zeros_like(step.chosen_log_ratio)
    return generator.loss(
        pair_log_ratio(step.chosen_log_ratio, step.rejected_log_ratio, log_weight, beta=beta)
    )


def _dpo(
    pair: PairStatistics, *, beta: float, generator: BregmanGenerator
) -> Float[Tensor, "pairs"]:
    del generator  # DPO is the logistic loss
    return dpo_loss(pair.chosen_log_ratio.sum(-1), pair.rejected_log_ratio.sum(-1), beta=beta)


LOSSES: dict[str, Method] = {
    "dpo": Method(_dpo, "none", "arXiv 2305.18290, eq. 7"),
    "tbpo_a": Method(_token_level, "kl", "TBPO-A, arXiv 2605.12288; METHOD §4", _step),
    "tbpo_q": Method(_token_level, "baseline", "TBPO-Q, arXiv 2605.12288; METHOD §4", _step),
    "tbpo": Method(
        _token_level, "none", "TBPO without state weight, an ablation; METHOD §2", _step
    ),
}
