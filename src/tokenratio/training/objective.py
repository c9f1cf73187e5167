"""From a model's answer on a batch to the loss of each example and what is logged of it."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenratio.losses import LOSSES
from tokenratio.ratios import baseline_state_weight, kl_state_weight
from tokenratio.training.config import TokenRatioConfig
from tokenratio.training.metrics import ExampleMetrics
from tokenratio.types import CompletionBatch, PairBatch, PairStatistics, StepBatch, StepStatistics


@dataclass(frozen=True)
class ExampleLosses:
    """What a batch adds to the step's loss.

    Attributes:
        total: Σ loss · share, which gradients flow from.
        loss: of each example, no gradient: a pair's, or the sum over an SFT row's tokens.
        metrics: what is logged of them.
    """

    total: Float[Tensor, ""]
    loss: Float[Tensor, "examples"]
    metrics: ExampleMetrics


def sft_losses(
    batch: CompletionBatch, answer: dict[str, Tensor], share: float | Tensor
) -> ExampleLosses:
    """Cross-entropy on the response tokens, a mean over tokens as in transformers.

    Args:
        share: what a token counts in the step's loss.
    """
    log_probs = batch.align(answer["log_probs"])
    tokens = batch.response_mask.sum(-1).to(log_probs.dtype)
    loss = -log_probs.sum(-1)
    ratios = {
        "loss": (loss.detach(), tokens),
        "logps/chosen": (log_probs.detach().sum(-1), torch.ones_like(tokens)),
    }
    return ExampleLosses(loss.sum() * share, loss.detach(), ExampleMetrics(ratios))


def preference_losses(
    batch: PairBatch,
    answer: dict[str, Tensor],
    config: TokenRatioConfig,
    baseline: nn.Module | None,
    share: float | Tensor,
) -> ExampleLosses:
    """The loss that `config.loss` names, per pair, from whole responses (METHOD §2-4).

    Args:
        answer: the policy's answer to a `TokenRequest`: `hidden`, `log_probs`, `ref_log_probs` and,
            for a method with the KL as state weight, `kl_ref_policy`.
        baseline: the state baseline of a method that has one.
        share: what a pair counts in the step's loss.
    """
    pair = pair_statistics(batch, answer, config, baseline)
    loss = LOSSES[config.loss].per_pair(pair, beta=config.beta, generator=config.bregman_generator)
    with torch.no_grad():
        kl = answer.get("kl_ref_policy")
        metrics = _preference_metrics(
            pair,
            batch.split(batch.align(answer["log_probs"])),
            None if kl is None else batch.split(batch.align(kl)),
            (pair.chosen_mask ^ pair.rejected_mask).sum(-1),
            loss.detach(),
            config,
        )
    return ExampleLosses(loss.sum() * share, loss.detach(), metrics)


def pair_statistics(
    batch: PairBatch,
    answer: dict[str, Tensor],
    config: TokenRatioConfig,
    baseline: nn.Module | None,
) -> PairStatistics:
    """Align both responses on their first token and form the state weight the method asks for."""
    chosen, rejected = batch.split(batch.align(answer["log_probs"] - answer["ref_log_probs"]))
    chosen_mask, rejected_mask = batch.split(batch.response_mask)
    state_weight = LOSSES[config.loss].state_weight
    if state_weight == "kl":
        log_weight = kl_state_weight(*batch.split(batch.align(answer["kl_ref_policy"])))
    elif state_weight == "baseline":
        assert baseline is not None
        log_weight = baseline_state_weight(
            *batch.split(batch.align(baseline(answer["hidden"]))),
            batch.pair_mask,
            center=config.center_baseline,
            clamp=config.baseline_clamp,
        )
    else:
        log_weight = torch.zeros_like(chosen)
    return PairStatistics(chosen, rejected, log_weight, chosen_mask, rejected_mask)


def step_objective(
    batch: StepBatch,
    config: TokenRatioConfig,
    baseline: nn.Module | None,
    share: float | Tensor,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What a `StepRequest` has to say of a method that is local to its step (METHOD §2-5).

    Args:
        baseline: the state baseline of a method that has one.
        share: what a pair counts in the step's loss; each of its T steps counts 1/T of it.
        dtype: the policy's; weights are float32 at least.
    """
    method = LOSSES[config.loss]
    generator = config.bregman_generator
    per_step = share / batch.lengths.to(torch.promote_types(dtype, torch.float32))

    def step_loss(steps: StepStatistics) -> Tensor:
        assert method.per_step is not None
        return method.per_step(steps, beta=config.beta, generator=generator)

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


def step_losses_of_pairs(
    batch: StepBatch, answer: dict[str, Tensor], config: TokenRatioConfig
) -> ExampleLosses:
    """The answer to a `StepRequest`, by pair. What is logged covers the steps compared."""
    with torch.no_grad():
        loss = batch.align(answer["per_step"]).sum(-1) / batch.lengths

        def sides(name: str) -> tuple[Tensor, Tensor]:
            chosen, rejected = (batch.align(side) for side in answer[name].chunk(2))
            return chosen, rejected

        log_probs, ref_log_probs = sides("log_probs"), sides("ref_log_probs")
        kl = sides("kl_ref_policy") if "kl_ref_policy" in answer else None
        if "log_state_weight" in answer:
            log_weight = batch.align(answer["log_state_weight"])
        else:
            log_weight = torch.zeros_like(log_probs[0]) if kl is None else kl_state_weight(*kl)
        pair = PairStatistics(
            log_probs[0] - ref_log_probs[0],
            log_probs[1] - ref_log_probs[1],
            log_weight,
            batch.step_mask,
            batch.step_mask,
        )
        metrics = _preference_metrics(pair, log_probs, kl, batch.past, loss, config)
    return ExampleLosses(answer["total"], loss, metrics)


def _preference_metrics(
    pair: PairStatistics,
    log_probs: tuple[Float[Tensor, "pairs steps"], Float[Tensor, "pairs steps"]],
    kl_ref_policy: tuple[Float[Tensor, "pairs steps"], Float[Tensor, "pairs steps"]] | None,
    past: Int[Tensor, "pairs"],
    loss: Float[Tensor, "pairs"],
    config: TokenRatioConfig,
) -> ExampleMetrics:
    """TRL's metrics for every method, and ours.

    Args:
        log_probs: the policy's, of chosen and rejected tokens, 0 past their ends.
        kl_ref_policy: at their states, likewise.
        past: response tokens past the shorter response, whether they were run or not.
    """
    one = torch.ones_like(loss)
    shared = pair.pair_mask.sum(-1).to(loss.dtype)
    chosen_tokens = pair.chosen_mask.sum(-1).to(loss.dtype)
    tokens = chosen_tokens + pair.rejected_mask.sum(-1).to(loss.dtype)
    chosen_sum, rejected_sum = pair.chosen_log_ratio.sum(-1), pair.rejected_log_ratio.sum(-1)
    margin = config.beta * (chosen_sum - rejected_sum)
    ratios = {
        "loss": (loss, one),
        "rewards/chosen": (config.beta * chosen_sum, one),
        "rewards/rejected": (config.beta * rejected_sum, one),
        "rewards/margins": (margin, one),
        "rewards/accuracies": ((margin > 0).to(loss.dtype), one),
        "logps/chosen": (log_probs[0].sum(-1), one),
        "logps/rejected": (log_probs[1].sum(-1), one),
        "log_ratio/mean": (chosen_sum + rejected_sum, tokens),
        "log_ratio/chosen": (chosen_sum, chosen_tokens),
        "tokens/past_shorter": (past.to(loss.dtype), past + 2 * shared),
    }
    state_weight = LOSSES[config.loss].state_weight
    if state_weight != "none":
        log_weight = pair.log_state_weight.masked_fill(~pair.pair_mask, 0.0)
        ratios["state_weight/mean"] = (log_weight.sum(-1), shared)
        ratios["state_weight/mean_square"] = (log_weight.square().sum(-1), shared)
        if state_weight == "baseline":
            clamped = (log_weight.abs() >= config.baseline_clamp) & pair.pair_mask
            ratios["state_weight/clamped"] = (clamped.sum(-1).to(loss.dtype), shared)
    if kl_ref_policy is not None:
        chosen_kl, rejected_kl = kl_ref_policy
        ratios["kl_ref_policy"] = (chosen_kl.sum(-1) + rejected_kl.sum(-1), tokens)
    largest = torch.maximum(
        pair.chosen_log_ratio.abs().amax(-1), pair.rejected_log_ratio.abs().amax(-1)
    )
    return ExampleMetrics(ratios, {"log_ratio/max_abs": largest})
