"""One small space of methods: generator × state weight × aggregation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokenratio.bregman import BregmanGenerator, ScaledBasu
from tokenratio.losses.method import Method, Need
from tokenratio.ratios import kl_state_weight, pair_log_ratio
from tokenratio.types import PairStatistics, StepStatistics

Aggregation = Literal["mean", "sum", "sequence"]
StateWeight = Literal["none", "kl", "baseline"]


def ratio_matching_loss(
    pair_log_ratio: Float[Tensor, "*shape"],
    *,
    generator: BregmanGenerator,
    label_smoothing: float = 0.0,
    is_robust: bool = False,
) -> Float[Tensor, "*shape"]:
    r"""ℓ_h(u) at every u = log R, with labels that may be wrong (docs/method.md §3).

    A label is the other way round with probability ε, so u is −u. `label_smoothing` takes the
    mixture (1−ε) ℓ(u) + ε ℓ(−u), cDPO's for the logistic generator and our extension for the
    others. `is_robust` removes the bias that the noise brings instead: ((1−ε) ℓ(u) − ε ℓ(−u)) /
    (1−2ε), of which the expectation over noisy labels is the loss of clean ones (arXiv 2403.00409,
    eq. 12).

    Args:
        pair_log_ratio: log R in nats, β applied; smaller is better.
        label_smoothing: ε in [0, 1/2).
    """
    loss = generator.loss(pair_log_ratio)
    if label_smoothing == 0:
        return loss
    flipped = generator.loss(-pair_log_ratio)
    if is_robust:
        loss = (1 - label_smoothing) * loss - label_smoothing * flipped
        return loss / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * loss + label_smoothing * flipped


def tbpo_loss(
    pair_log_ratio: Float[Tensor, "pairs tokens"],
    pair_mask: Bool[Tensor, "pairs tokens"],
    *,
    generator: BregmanGenerator,
    aggregation: Literal["mean", "sum"] = "mean",
    label_smoothing: float = 0.0,
    is_robust: bool = False,
) -> Float[Tensor, "pairs"]:
    r"""Bregman ratio-matching loss of each pair (TBPO, arXiv 2605.12288, eq. 10;
    docs/method.md §3).

    Args:
        pair_log_ratio: log R_t in nats, β applied; any value, even NaN, where the mask is False.
        pair_mask: True where both responses have a token.
        generator: the divergence; its `loss` is applied pointwise.
        aggregation: over a pair's shared tokens: their mean (TBPO) or sum (ADPO, arXiv 2602.09533).
        label_smoothing: see `ratio_matching_loss`; `is_robust` likewise.
    Returns:
        One value a pair, unreduced over pairs; 0 for a pair that shares no token.
    """
    # The input is masked, not the output: 0 × nan would poison the gradient.
    per_token = ratio_matching_loss(
        pair_log_ratio.masked_fill(~pair_mask, 0.0),
        generator=generator,
        label_smoothing=label_smoothing,
        is_robust=is_robust,
    )
    total = (per_token * pair_mask).sum(-1)
    return total if aggregation == "sum" else total / pair_mask.sum(-1).clamp_min(1)


def bpo_loss(
    pair_log_ratio: Float[Tensor, "pairs tokens"],
    *,
    generator: BregmanGenerator,
    label_smoothing: float = 0.0,
    is_robust: bool = False,
) -> Float[Tensor, "pairs"]:
    r"""ℓ_h(Σ_t log R_t) over whole responses (BPO, arXiv 2505.19601, eq. 11; docs/method.md §6).

    With the logistic generator it is DPO (arXiv 2305.18290, eq. 7), and TDPO1 where `log R` has the
    KL as state weight (arXiv 2404.11999, eq. 16).

    Args:
        pair_log_ratio: log R_t in nats, β applied; past a response's end its part of it is 0.
        label_smoothing: see `ratio_matching_loss`; `is_robust` likewise.
    """
    return ratio_matching_loss(
        pair_log_ratio.sum(-1),
        generator=generator,
        label_smoothing=label_smoothing,
        is_robust=is_robust,
    )


@dataclass(frozen=True)
class RatioMatching(Method):
    """A point of the space: log R_t = β (ρ_t^l − ρ_t^w + log w_t), under a generator.

    Attributes:
        state_weight: log w_t: `none`, 0; `kl`, KL_t^l − KL_t^w with all gradients; `baseline`,
            b(s_t^l) − b(s_t^w), learned (docs/method.md §2).
        aggregation: `mean` or `sum` over the T shared steps; `sequence`, log R summed over whole
            responses.
        generator: fixed; None for the user's.
        default_generator: then used if the user names none.
        label_smoothing: ε by default.
        is_robust: what is done about ε: see `ratio_matching_loss`.
        tdpo_alpha: where it is a setting, its default: the KL's weight, and then the chosen
            response's KL is a constant (TDPO2, arXiv 2404.11999, eq. 18).
    """

    source: str
    state_weight: StateWeight = "none"
    aggregation: Aggregation = "mean"
    generator: BregmanGenerator | None = None
    default_generator: BregmanGenerator = ScaledBasu()  # noqa: RUF009 - frozen
    label_smoothing: float = 0.0
    is_robust: bool = False
    tdpo_alpha: float | None = None

    @property
    def level(self) -> str:  # type: ignore[override]
        if self.aggregation != "sequence":
            return "token"
        return "response" if self.state_weight == "none" else "token terms, response"

    @property
    def needs(self) -> frozenset[Need]:
        beside: dict[str, set[Need]] = {"kl": {"kl_ref_policy"}, "baseline": {"baseline"}}
        return frozenset({"ref_log_probs", *beside.get(self.state_weight, set())})

    @property
    def settings(self) -> Mapping[str, Any]:
        settings: dict[str, Any] = {"beta": 0.1, "label_smoothing": self.label_smoothing}
        if self.generator is None:
            settings["generator"] = self.default_generator
        if self.tdpo_alpha is not None:
            settings["tdpo_alpha"] = self.tdpo_alpha
        return settings

    @property
    def is_local(self) -> bool:
        return self.aggregation != "sequence"

    def log_state_weight(
        self,
        like: Float[Tensor, "*shape"],
        chosen_kl: Float[Tensor, "*shape"] | None,
        rejected_kl: Float[Tensor, "*shape"] | None,
        *,
        tdpo_alpha: float | None = None,
    ) -> Float[Tensor, "*shape"]:
        """log w of the KL, or zeros `like` something where there is none."""
        if self.state_weight != "kl":
            return torch.zeros_like(like)
        if chosen_kl is None or rejected_kl is None:
            raise ValueError("this loss needs the KL at every state")
        if self.tdpo_alpha is None:
            return kl_state_weight(chosen_kl, rejected_kl)
        alpha = self.tdpo_alpha if tdpo_alpha is None else tdpo_alpha
        return alpha * kl_state_weight(chosen_kl.detach(), rejected_kl)

    def per_pair(self, pair: PairStatistics, **settings: Any) -> Float[Tensor, "pairs"]:
        chosen, rejected = pair.chosen, pair.rejected
        log_weight = pair.log_state_weight
        if self.state_weight != "baseline":
            alpha = settings.get("tdpo_alpha")
            log_weight = self.log_state_weight(
                chosen.log_probs, chosen.kl, rejected.kl, tdpo_alpha=alpha
            )
        if log_weight is None:
            raise ValueError("this loss needs a learned baseline's state weight")
        log_ratio = pair_log_ratio(
            chosen.log_ratio, rejected.log_ratio, log_weight, beta=self._beta(settings)
        )
        how = self._divergence(settings)
        if self.aggregation == "sequence":
            return bpo_loss(log_ratio, **how)
        return tbpo_loss(log_ratio, pair.pair_mask, aggregation=self.aggregation, **how)

    def per_step(self, step: StepStatistics, **settings: Any) -> Float[Tensor, "steps"]:
        if not self.is_local:
            return super().per_step(step, **settings)
        log_weight = step.log_state_weight
        if self.state_weight != "baseline":
            log_weight = self.log_state_weight(
                step.chosen_log_ratio,
                step.chosen_kl,
                step.rejected_kl,
                tdpo_alpha=settings.get("tdpo_alpha"),
            )
        if log_weight is None:
            raise ValueError("this loss needs a learned baseline's state weight")
        log_ratio = pair_log_ratio(
            step.chosen_log_ratio, step.rejected_log_ratio, log_weight, beta=self._beta(settings)
        )
        return ratio_matching_loss(log_ratio, **self._divergence(settings))

    def _beta(self, settings: Mapping[str, Any]) -> float:
        return float(settings.get("beta", self.settings["beta"]))

    def _divergence(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        # A fixed generator stays, whatever is given: one call can then go over all methods.
        unknown = settings.keys() - self.settings.keys() - {"generator"}
        if unknown:
            raise TypeError(f"this loss takes no {', '.join(sorted(unknown))}")
        return {
            "generator": self.generator or settings.get("generator", self.default_generator),
            "label_smoothing": settings.get("label_smoothing", self.label_smoothing),
            "is_robust": self.is_robust,
        }
