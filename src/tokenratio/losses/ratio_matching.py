"""TBPO and its relatives: each is a choice of generator, state weight and aggregation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor

from tokenratio.bregman import BregmanGenerator, Logistic
from tokenratio.losses.method import REFERENCE, Method, Need
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
    r"""ℓ_h(u) at every u = log R, for labels that may be wrong (docs/method.md §3).

    A label is wrong with probability ε, and then u is −u. `label_smoothing` takes the mixture
    (1−ε) ℓ(u) + ε ℓ(−u), which is cDPO's for the logistic generator and our extension for the
    others. `is_robust` removes the bias of the noise instead: ((1−ε) ℓ(u) − ε ℓ(−u)) / (1−2ε), the
    expectation of which over noisy labels is the loss of clean ones (arXiv 2403.00409, eq. 12).

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
    chosen_log_ratio: Float[Tensor, "*steps"],
    rejected_log_ratio: Float[Tensor, "*steps"],
    log_state_weight: Float[Tensor, "*steps"] | float = 0.0,
    *,
    beta: float,
    generator: BregmanGenerator,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "*steps"]:
    r"""TBPO: ℓ_h(R_t) at each step (arXiv 2605.12288, eq. 10; docs/method.md §3).

    A pair's loss is the mean over the T steps both responses have, `over_steps`; training forms it
    by weighting each step with 1/T.

    Args:
        chosen_log_ratio, rejected_log_ratio: ρ_t in nats, of any number of steps.
        log_state_weight: log w_t before β; 0 is the uncorrected ablation.
        beta: > 0; the larger, the closer the policy stays to the reference.
        generator: the divergence; its `loss` is applied pointwise.
        label_smoothing: ε; see `ratio_matching_loss`.
    """
    return ratio_matching_loss(
        pair_log_ratio(chosen_log_ratio, rejected_log_ratio, log_state_weight, beta=beta),
        generator=generator,
        label_smoothing=label_smoothing,
    )


def over_steps(
    per_step: Float[Tensor, "steps"],
    pair_mask: Bool[Tensor, "pairs longest"],
    aggregation: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, "pairs"]:
    """A pair's loss from the losses of its steps.

    Args:
        per_step: one value for each True of the mask, row by row.
        pair_mask: True where both responses have a token.
        aggregation: the mean (TBPO) or the sum (ADPO, arXiv 2602.09533) over the pair's steps.
    Returns:
        One value per pair; 0 for a pair without a shared step.
    """
    total = per_step.new_zeros(pair_mask.shape).masked_scatter(pair_mask, per_step).sum(-1)
    return total if aggregation == "sum" else total / pair_mask.sum(-1).clamp_min(1)


def bpo_loss(
    chosen_log_ratio: Float[Tensor, "pairs steps"],
    rejected_log_ratio: Float[Tensor, "pairs steps"],
    log_state_weight: Float[Tensor, "pairs steps"] | float = 0.0,
    *,
    beta: float,
    generator: BregmanGenerator,
    label_smoothing: float = 0.0,
    is_robust: bool = False,
) -> Float[Tensor, "pairs"]:
    r"""BPO: ℓ_h(Σ_t log R_t) over whole responses (arXiv 2505.19601, eq. 11; docs/method.md §6).

    With the logistic generator it is DPO, and TDPO1 where the KL is the state weight
    (arXiv 2404.11999, eq. 16).

    Args:
        chosen_log_ratio, rejected_log_ratio: ρ_t in nats, 0 past the response's end.
        log_state_weight: log w_t before β, 0 where neither response has a token.
        beta: > 0; the larger, the closer the policy stays to the reference.
        label_smoothing, is_robust: see `ratio_matching_loss`.
    """
    log_ratio = pair_log_ratio(chosen_log_ratio, rejected_log_ratio, log_state_weight, beta=beta)
    return ratio_matching_loss(
        log_ratio.sum(-1),
        generator=generator,
        label_smoothing=label_smoothing,
        is_robust=is_robust,
    )


def dpo_loss(
    chosen_log_ratio: Float[Tensor, "pairs steps"],
    rejected_log_ratio: Float[Tensor, "pairs steps"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
    is_robust: bool = False,
) -> Float[Tensor, "pairs"]:
    r"""DPO: −log σ(β (Σρ^w − Σρ^l)) (arXiv 2305.18290, eq. 7; docs/method.md §6).

    Args:
        chosen_log_ratio, rejected_log_ratio: ρ_t in nats, 0 past the response's end.
        beta: > 0; the larger, the closer the policy stays to the reference.
        label_smoothing: ε of cDPO's mixture or, if `is_robust`, of rDPO's correction; see
            `ratio_matching_loss`.
    """
    return bpo_loss(
        chosen_log_ratio,
        rejected_log_ratio,
        beta=beta,
        generator=Logistic(),
        label_smoothing=label_smoothing,
        is_robust=is_robust,
    )


@dataclass(frozen=True)
class RatioMatching(Method):
    """A method of this family: log R_t = β (ρ_t^l − ρ_t^w + log w_t), under a generator.

    Attributes:
        equation: the loss as a function of both responses' log-ratios and, unless `state_weight`
            is `none`, of log w_t: `tbpo_loss` (local to its step), `bpo_loss` or `dpo_loss`.
        state_weight: log w_t: `none`, 0; `kl`, KL_t^l − KL_t^w with all gradients; `baseline`,
            b(s_t^l) − b(s_t^w), learned (docs/method.md §2).
        aggregation: `mean` or `sum` over the T shared steps; `sequence`, log R summed over whole
            responses.
        settings: with `generator` where it is the user's choice; with `tdpo_alpha` the KL has that
            weight, and the chosen response's is a constant (TDPO2, arXiv 2404.11999, eq. 18).
        fixed: arguments of `equation` that are not settings.
    """

    equation: Callable[..., Float[Tensor, "*losses"]]
    source: str
    state_weight: StateWeight
    aggregation: Aggregation
    settings: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> str:  # type: ignore[override]
        if self.aggregation != "sequence":
            return "token"
        return "response" if self.state_weight == "none" else "token terms, response"

    @cached_property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        extra: dict[str, set[Need]] = {"kl": {"kl_ref_policy"}, "baseline": {"baseline"}}
        return REFERENCE | extra.get(self.state_weight, set())

    @property
    def is_local(self) -> bool:
        return self.aggregation != "sequence"

    def log_state_weight(
        self, steps: StepStatistics, *, tdpo_alpha: float | None = None
    ) -> Float[Tensor, "*steps"]:
        """log w_t before β; `ValueError` if the statistics lack what it is computed from."""
        if self.state_weight == "baseline":
            if steps.log_state_weight is None:
                raise ValueError("this loss needs a learned baseline's state weight")
            return steps.log_state_weight
        if steps.chosen_kl is None or steps.rejected_kl is None:
            raise ValueError("this loss needs the KL at every state")
        if tdpo_alpha is None:
            return kl_state_weight(steps.chosen_kl, steps.rejected_kl)
        return tdpo_alpha * kl_state_weight(steps.chosen_kl.detach(), steps.rejected_kl)

    def per_step(self, steps: StepStatistics, **settings: Any) -> Float[Tensor, "*steps"]:
        if self.aggregation == "sequence":
            return super().per_step(steps)
        statistics, settings = self._arguments(steps, settings)
        return self.equation(*statistics, **settings)

    def per_pair(self, pair: PairStatistics, **settings: Any) -> Float[Tensor, "pairs"]:
        if self.aggregation == "sequence":
            statistics, settings = self._arguments(pair.steps, settings)
            return self.equation(*statistics, **settings)
        mask = pair.pair_mask
        return over_steps(self.per_step(pair.steps[mask], **settings), mask, self.aggregation)

    def _arguments(
        self, steps: StepStatistics, given: Mapping[str, Any]
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """What `equation` takes, by position and by name."""
        settings = self.complete(given)
        alpha = settings.pop("tdpo_alpha", None)
        statistics = [steps.chosen_log_ratio, steps.rejected_log_ratio]
        if self.state_weight != "none":
            statistics.append(self.log_state_weight(steps, tdpo_alpha=alpha))
        return statistics, {**settings, **self.fixed}
