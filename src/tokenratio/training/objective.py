"""From the token statistics of a batch to the loss of each example and its metrics."""

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenratio.losses import RatioMatching, anchor_loss, over_steps
from tokenratio.models.state_baseline import StateBaseline
from tokenratio.models.token_requests import StepObjective
from tokenratio.ratios import baseline_state_weight
from tokenratio.training.config import TokenRatioConfig
from tokenratio.training.metrics import ExampleLosses, ExampleMetrics, reward_metrics
from tokenratio.types import (
    PairBatch,
    PairStatistics,
    ResponseStatistics,
    StepBatch,
    StepStatistics,
)


class PreferenceLosses:
    """The loss that `config.loss` names, with its settings resolved once (docs/method.md §2-5)."""

    def __init__(self, config: TokenRatioConfig) -> None:
        self.config, self.method, self.settings = config, config.method, config.loss_settings

    def of_pairs(
        self,
        batch: PairBatch,
        answer: dict[str, Tensor],
        baseline: StateBaseline | None,
        share: float | Tensor,
    ) -> ExampleLosses:
        """The losses of whole responses.

        Args:
            answer: of the policy to a `TokenRequest`: `hidden`, `log_probs`, and whatever else the
                method needs.
            baseline: the state baseline of a method that has one.
            share: the weight of a pair in the step's loss.
        """
        chosen_mask, rejected_mask = batch.split(batch.response_mask)
        chosen, rejected = _responses(batch, answer, chosen_mask, rejected_mask)
        log_weight = None
        if self.method.needs_baseline:
            is_either = chosen_mask | rejected_mask
            mask = batch.pair_mask if self.method.is_local else is_either
            log_weight = self._learned_state_weight(batch, baseline, answer["hidden"], mask)
        pair = PairStatistics(chosen, rejected, log_weight)
        loss = self.method.per_pair(pair, **self.settings)
        sft_weight = self.config.sft_weight
        if sft_weight:
            anchor = anchor_loss(chosen.log_probs, chosen.mask)
            loss = loss + sft_weight * anchor
        with torch.no_grad():
            past = (chosen.mask ^ rejected.mask).sum(-1)
            metrics = self._metrics(pair, past, loss.detach())
            if sft_weight:
                metrics.ratios["sft_anchor"] = (anchor.detach(), torch.ones_like(anchor))
        return ExampleLosses(loss.sum() * share, loss.detach(), metrics)

    def for_steps(
        self,
        batch: StepBatch,
        baseline: StateBaseline | None,
        share: float | Tensor,
        dtype: torch.dtype,
    ) -> StepObjective:
        """The loss as part of a `TokenRequest`, for a method that is local to its step.

        Args:
            baseline: the state baseline of a method that has one.
            share: the weight of a pair in the step's loss; where the loss is a mean over the pair's
                T steps, each of them has 1/T of it.
            dtype: the policy's; weights are float32 at least.
        """
        method, settings, mask = self.method, self.settings, batch.step_mask
        counts = torch.ones_like(batch.lengths) if self._is_sum else batch.lengths
        per_step = share / counts.to(torch.promote_types(dtype, torch.float32))

        def log_state_weight(hidden: Tensor) -> Tensor:
            return self._learned_state_weight(batch, baseline, hidden, mask)[mask]

        return StepObjective(
            partial(method.per_step, **settings),
            (per_step[:, None] * mask)[mask],
            log_state_weight if method.needs_baseline else None,
        )

    def of_steps(self, batch: StepBatch, answer: dict[str, Tensor]) -> ExampleLosses:
        """The losses of pairs from the answer to `for_steps`; metrics cover the steps compared."""
        mask = batch.step_mask
        with torch.no_grad():
            loss = over_steps(answer["per_step"], mask, "sum" if self._is_sum else "mean")
            log_weight = answer.get("log_state_weight")
            if log_weight is not None:
                log_weight = batch.align(log_weight)
            pair = PairStatistics(*_responses(batch, answer, mask, mask), log_weight)
            metrics = self._metrics(pair, batch.past, loss)
        return ExampleLosses(answer["total"], loss, metrics)

    @property
    def _is_sum(self) -> bool:
        return isinstance(self.method, RatioMatching) and self.method.aggregation == "sum"

    def _learned_state_weight(
        self,
        batch: PairBatch | StepBatch,
        baseline: StateBaseline | None,
        hidden: Tensor,
        mask: Bool[Tensor, "pairs steps"],
    ) -> Float[Tensor, "pairs steps"]:
        """log w_t of the state baseline, 0 outside the mask."""
        assert baseline is not None
        return baseline_state_weight(
            *batch.sides(baseline(hidden)),
            mask,
            center=self.config.center_baseline,
            clamp=self.config.baseline_clamp,
        )

    def _metrics(
        self, pair: PairStatistics, past: Int[Tensor, "pairs"], loss: Float[Tensor, "pairs"]
    ) -> ExampleMetrics:
        """The metrics of each pair.

        A response's reward is β Σ_t ρ_t; without a reference β times its mean log-probability, as
        SimPO's.

        Args:
            past: response tokens past the shorter response, whether they were run or not.
        """
        chosen, rejected, beta = pair.chosen, pair.rejected, self.settings["beta"]
        one, shared = torch.ones_like(loss), pair.pair_mask.sum(-1).to(loss.dtype)
        lengths = chosen.lengths, rejected.lengths
        tokens = lengths[0] + lengths[1]
        ratios, peaks = {}, {}
        if self.method.has_reference:
            steps = pair.steps
            log_ratios = steps.chosen_log_ratio, steps.rejected_log_ratio
            totals = log_ratios[0].sum(-1), log_ratios[1].sum(-1)
            rewards = beta * totals[0], beta * totals[1]
            ratios["log_ratio/mean"] = (totals[0] + totals[1], tokens)
            ratios["log_ratio/chosen"] = (totals[0], lengths[0])
            peaks["log_ratio/max_abs"] = torch.maximum(
                log_ratios[0].abs().amax(-1), log_ratios[1].abs().amax(-1)
            )
            ratios |= self._state_weight_metrics(steps, pair.pair_mask, shared)
        else:
            sums = chosen.log_probs.sum(-1), rejected.log_probs.sum(-1)
            rewards = beta * sums[0] / lengths[0], beta * sums[1] / lengths[1]
        if chosen.kl is not None and rejected.kl is not None:
            ratios["kl_ref_policy"] = (chosen.kl.sum(-1) + rejected.kl.sum(-1), tokens)
        of_every_method = {
            "loss": (loss, one),
            **reward_metrics(*rewards),
            "logps/chosen": (chosen.log_probs.sum(-1), one),
            "logps/rejected": (rejected.log_probs.sum(-1), one),
            "tokens/past_shorter": (past.to(loss.dtype), past + 2 * shared),
        }
        return ExampleMetrics(of_every_method | ratios, peaks)

    def _state_weight_metrics(
        self,
        steps: StepStatistics,
        pair_mask: Bool[Tensor, "pairs steps"],
        shared: Float[Tensor, "pairs"],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Metrics of log w at the steps both responses have."""
        method = self.method
        if not isinstance(method, RatioMatching) or method.state_weight == "none":
            return {}
        alpha = self.settings.get("tdpo_alpha")
        log_weight = method.log_state_weight(steps, tdpo_alpha=alpha)
        log_weight = log_weight.masked_fill(~pair_mask, 0.0)
        metrics = {
            "state_weight/mean": (log_weight.sum(-1), shared),
            "state_weight/mean_square": (log_weight.square().sum(-1), shared),
        }
        if method.needs_baseline:
            clamped = (log_weight.abs() >= self.config.baseline_clamp) & pair_mask
            metrics["state_weight/clamped"] = (clamped.sum(-1).to(shared.dtype), shared)
        return metrics


def _responses(
    batch: PairBatch | StepBatch,
    answer: dict[str, Tensor],
    chosen_mask: Bool[Tensor, "pairs steps"],
    rejected_mask: Bool[Tensor, "pairs steps"],
) -> tuple[ResponseStatistics, ResponseStatistics]:
    """Both responses of every pair, aligned on their first token."""

    def sides(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if values is None else batch.sides(values)

    log_probs = batch.sides(answer["log_probs"])
    ref_log_probs, kl = sides(answer.get("ref_log_probs")), sides(answer.get("kl_ref_policy"))
    contrast = sides(getattr(batch, "contrast", None))
    return (
        ResponseStatistics(log_probs[0], chosen_mask, ref_log_probs[0], kl[0], contrast[0]),
        ResponseStatistics(log_probs[1], rejected_mask, ref_log_probs[1], kl[1], contrast[1]),
    )
