"""From a model's answer on a batch to the loss of each example and what is logged of it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenratio.losses import LOSSES
from tokenratio.ratios import baseline_state_weight, kl_state_weight
from tokenratio.training.config import TokenRatioConfig
from tokenratio.training.metrics import ExampleMetrics
from tokenratio.types import CompletionBatch, PairBatch, PairStatistics


@dataclass(frozen=True)
class ExampleLosses:
    """The batch's loss is `sum(loss) / sum(weight)`; a pair weighs 1, an SFT row its tokens."""

    loss: Float[Tensor, "examples"]
    weight: Float[Tensor, "examples"]
    metrics: ExampleMetrics


def sft_losses(batch: CompletionBatch, answer: dict[str, Tensor]) -> ExampleLosses:
    """Cross-entropy on the response tokens, a mean over tokens as in transformers."""
    log_probs = batch.align(answer["log_probs"])
    tokens = batch.response_mask.sum(-1).to(log_probs.dtype)
    loss = -log_probs.sum(-1)
    ratios = {
        "loss": (loss.detach(), tokens),
        "logps/chosen": (log_probs.detach().sum(-1), torch.ones_like(tokens)),
    }
    return ExampleLosses(loss, tokens, ExampleMetrics(ratios))


def preference_losses(
    batch: PairBatch,
    answer: dict[str, Tensor],
    config: TokenRatioConfig,
    baseline: nn.Module | None,
) -> ExampleLosses:
    """The loss that `config.loss` names, per pair (METHOD §2-4).

    Args:
        answer: the policy's answer to a `TokenRequest`: `hidden`, `log_probs`, `ref_log_probs` and,
            for a method with the KL as state weight, `kl_ref_policy`.
        baseline: the state baseline of a method that has one.
    """
    pair = pair_statistics(batch, answer, config, baseline)
    loss = LOSSES[config.loss].per_pair(pair, beta=config.beta, generator=config.bregman_generator)
    with torch.no_grad():
        metrics = _preference_metrics(batch, answer, pair, loss, config)
    return ExampleLosses(loss, torch.ones_like(loss), metrics)


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


def _preference_metrics(
    batch: PairBatch,
    answer: dict[str, Tensor],
    pair: PairStatistics,
    loss: Float[Tensor, "pairs"],
    config: TokenRatioConfig,
) -> ExampleMetrics:
    one = torch.ones_like(loss)
    shared = pair.pair_mask.sum(-1).to(loss.dtype)
    chosen_tokens = pair.chosen_mask.sum(-1).to(loss.dtype)
    rejected_tokens = pair.rejected_mask.sum(-1).to(loss.dtype)
    tokens = chosen_tokens + rejected_tokens
    # TRL's definition for every method: the implicit reward of the whole response.
    chosen_sum, rejected_sum = pair.chosen_log_ratio.sum(-1), pair.rejected_log_ratio.sum(-1)
    margin = config.beta * (chosen_sum - rejected_sum)
    chosen_logps, rejected_logps = batch.split(batch.align(answer["log_probs"]).sum(-1))
    ratios = {
        "loss": (loss.detach(), one),
        "rewards/chosen": (config.beta * chosen_sum, one),
        "rewards/rejected": (config.beta * rejected_sum, one),
        "rewards/margins": (margin, one),
        "rewards/accuracies": ((margin > 0).to(loss.dtype), one),
        "logps/chosen": (chosen_logps, one),
        "logps/rejected": (rejected_logps, one),
        "log_ratio/mean": (chosen_sum + rejected_sum, tokens),
        "log_ratio/chosen": (chosen_sum, chosen_tokens),
        "tokens/past_shorter": (tokens - 2 * shared, tokens),
    }
    state_weight = LOSSES[config.loss].state_weight
    if state_weight != "none":
        log_weight = pair.log_state_weight.masked_fill(~pair.pair_mask, 0.0)
        ratios["state_weight/mean"] = (log_weight.sum(-1), shared)
        ratios["state_weight/mean_square"] = (log_weight.square().sum(-1), shared)
        if state_weight == "baseline":
            clamped = (log_weight.abs() >= config.baseline_clamp) & pair.pair_mask
            ratios["state_weight/clamped"] = (clamped.sum(-1).to(loss.dtype), shared)
    if "kl_ref_policy" in answer:
        chosen_kl, rejected_kl = batch.split(batch.align(answer["kl_ref_policy"]).sum(-1))
        ratios["kl_ref_policy"] = (chosen_kl + rejected_kl, tokens)
    largest = torch.maximum(
        pair.chosen_log_ratio.abs().amax(-1), pair.rejected_log_ratio.abs().amax(-1)
    )
    return ExampleMetrics(ratios, {"log_ratio/max_abs": largest})
