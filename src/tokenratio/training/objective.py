"""From a model's answer on a batch to the loss of each example and what is logged of it."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenratio.losses import RatioMatching, anchor_loss
from tokenratio.ratios import baseline_state_weight
from tokenratio.training.config import TokenRatioConfig
from tokenratio.training.metrics import ExampleLosses, ExampleMetrics
from tokenratio.types import (
    PairBatch,
    PairStatistics,
    ResponseStatistics,
    StepBatch,
    StepStatistics,
)


def preference_losses(
    batch: PairBatch,
    answer: dict[str, Tensor],
    config: TokenRatioConfig,
    baseline: nn.Module | None,
    share: float | Tensor,
) -> ExampleLosses:
    """The loss that `config.loss` names, per pair, from whole responses (docs/method.md §2-4).

    Args:
        answer: the policy's answer to a `TokenRequest`: `hidden`, `log_probs`, and what else the
            method needs.
        baseline: the state baseline of a method that has one.
        share: what a pair counts in the step's loss.
    """
    pair = pair_statistics(batch, answer, config, baseline)
    loss = config.method.per_pair(pair, **config.loss_settings)
    if config.sft_weight:
        anchor = anchor_loss(pair.chosen.log_probs, pair.chosen.mask)
        loss = loss + config.sft_weight * anchor
    with torch.no_grad():
        past = (pair.chosen.mask ^ pair.rejected.mask).sum(-1)
        metrics = _preference_metrics(pair, past, loss.detach(), config)
        if config.sft_weight:
            metrics.ratios["sft_anchor"] = (anchor.detach(), torch.ones_like(anchor))
    return ExampleLosses(loss.sum() * share, loss.detach(), metrics)


def pair_statistics(
    batch: PairBatch,
    answer: dict[str, Tensor],
    config: TokenRatioConfig,
    baseline: nn.Module | None,
) -> PairStatistics:
    """Align both responses on their first token and form the state weight a baseline gives."""

    def sides(of_labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if of_labels is None else batch.split(batch.align(of_labels))

    chosen, rejected = (
        ResponseStatistics(*of_side)
        for of_side in zip(
            batch.split(batch.align(answer["log_probs"])),
            batch.split(batch.response_mask),
            sides(answer.get("ref_log_probs")),
            sides(answer.get("kl_ref_policy")),
            sides(batch.contrast),
            strict=True,
        )
    )
    log_weight = None
    if config.method.state_weight == "baseline":
        assert baseline is not None
        is_either = chosen.mask | rejected.mask
        log_weight = baseline_state_weight(
            *batch.split(batch.align(baseline(answer["hidden"]))),
            batch.pair_mask if config.method.is_local else is_either,
            center=config.center_baseline,
            clamp=config.baseline_clamp,
        )
    return PairStatistics(chosen, rejected, log_weight)


def step_objective(
    batch: StepBatch,
    config: TokenRatioConfig,
    baseline: nn.Module | None,
    share: float | Tensor,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What a `StepRequest` has to say of a method that is local to its step (docs/method.md §2-5).

    Args:
        baseline: the state baseline of a method that has one.
        share: what a pair counts in the step's loss; where it is a mean over the pair's T steps,
            each of them counts 1/T of it.
        dtype: the policy's; weights are float32 at least.
    """
    method, settings = config.method, config.loss_settings
    dtype = torch.promote_types(dtype, torch.float32)
    per_step = share / _divisor(batch, config).to(dtype)

    def step_loss(steps: StepStatistics) -> Tensor:
        return method.per_step(steps, **settings)

    def log_state_weight(hidden: Tensor) -> Tensor:
        assert baseline is not None
        mask = batch.step_mask
        weight = baseline_state_weight(
            *(batch.align(of_side) for of_side in baseline(hidden).chunk(2)),
            mask,
            center=config.center_baseline,
            clamp=config.baseline_clamp,
        )
        return weight[mask]

    return {
        "step_loss": step_loss,
        "step_weight": (per_step[:, None] * batch.step_mask)[batch.step_mask],
        "ref_log_probs": batch.ref_log_probs,
        "with_kl": method.state_weight == "kl",
        "log_state_weight": log_state_weight if method.state_weight == "baseline" else None,
    }


def _divisor(batch: StepBatch, config: TokenRatioConfig) -> Int[Tensor, "pairs"]:
    """What the sum over a pair's steps is divided by: their number, for a mean."""
    method = config.method
    is_sum = isinstance(method, RatioMatching) and method.aggregation == "sum"
    return torch.ones_like(batch.lengths) if is_sum else batch.lengths


def step_losses_of_pairs(
    batch: StepBatch, answer: dict[str, Tensor], config: TokenRatioConfig
) -> ExampleLosses:
    """The answer to a `StepRequest`, by pair. What is logged covers the steps compared."""
    with torch.no_grad():
        loss = batch.align(answer["per_step"]).sum(-1) / _divisor(batch, config)

        def sides(name: str) -> list[Tensor | None]:
            if name not in answer:
                return [None, None]
            return [batch.align(side) for side in answer[name].chunk(2)]

        names = ("log_probs", "ref_log_probs", "kl_ref_policy")
        chosen, rejected = (
            ResponseStatistics(log_probs, batch.step_mask, ref_log_probs, kl)
            for log_probs, ref_log_probs, kl in zip(*map(sides, names), strict=True)
        )
        log_weight = answer.get("log_state_weight")
        if log_weight is not None:
            log_weight = batch.align(log_weight)
        pair = PairStatistics(chosen, rejected, log_weight)
        metrics = _preference_metrics(pair, batch.past, loss, config)
    return ExampleLosses(answer["total"], loss, metrics)


def _preference_metrics(
    pair: PairStatistics,
    past: Int[Tensor, "pairs"],
    loss: Float[Tensor, "pairs"],
    config: TokenRatioConfig,
) -> ExampleMetrics:
    """TRL's metrics for every method, and ours.

    A response's reward is β Σ_t ρ_t; without a reference β times its mean log-probability, as
    SimPO's.

    Args:
        past: response tokens past the shorter response, whether they were run or not.
    """
    chosen, rejected = pair.chosen, pair.rejected
    one = torch.ones_like(loss)
    shared = pair.pair_mask.sum(-1).to(loss.dtype)
    tokens = chosen.lengths + rejected.lengths
    if config.method.has_reference:
        rewards = [config.beta * side.log_ratio.sum(-1) for side in (chosen, rejected)]
    else:
        rewards = [
            config.beta * side.log_probs.sum(-1) / side.lengths for side in (chosen, rejected)
        ]
    margin = rewards[0] - rewards[1]
    ratios = {
        "loss": (loss, one),
        "rewards/chosen": (rewards[0], one),
        "rewards/rejected": (rewards[1], one),
        "rewards/margins": (margin, one),
        "rewards/accuracies": ((margin > 0).to(loss.dtype), one),
        "rewards/ties": ((margin == 0).to(loss.dtype), one),
        "logps/chosen": (chosen.log_probs.sum(-1), one),
        "logps/rejected": (rejected.log_probs.sum(-1), one),
        "tokens/past_shorter": (past.to(loss.dtype), past + 2 * shared),
    }
    peaks = {}
    if config.method.has_reference:
        ratio = (chosen.log_ratio, rejected.log_ratio)
        ratios["log_ratio/mean"] = (ratio[0].sum(-1) + ratio[1].sum(-1), tokens)
        ratios["log_ratio/chosen"] = (ratio[0].sum(-1), chosen.lengths)
        peaks["log_ratio/max_abs"] = torch.maximum(*(of_side.abs().amax(-1) for of_side in ratio))
    ratios |= _state_weight_metrics(pair, shared, config)
    if chosen.kl is not None and rejected.kl is not None:
        ratios["kl_ref_policy"] = (chosen.kl.sum(-1) + rejected.kl.sum(-1), tokens)
    return ExampleMetrics(ratios, peaks)


def _state_weight_metrics(
    pair: PairStatistics, shared: Float[Tensor, "pairs"], config: TokenRatioConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of log w at the steps both responses have."""
    method = config.method
    if method.state_weight == "none":
        return {}
    log_weight = pair.log_state_weight
    if log_weight is None:
        assert isinstance(method, RatioMatching)
        log_weight = method.log_state_weight(
            pair.chosen.log_probs,
            pair.chosen.kl,
            pair.rejected.kl,
            tdpo_alpha=config.tdpo_alpha,
        )
    log_weight = log_weight.masked_fill(~pair.pair_mask, 0.0)
    metrics = {
        "state_weight/mean": (log_weight.sum(-1), shared),
        "state_weight/mean_square": (log_weight.square().sum(-1), shared),
    }
    if method.state_weight == "baseline":
        clamped = (log_weight.abs() >= config.baseline_clamp) & pair.pair_mask
        metrics["state_weight/clamped"] = (clamped.sum(-1).to(shared.dtype), shared)
    return metrics
