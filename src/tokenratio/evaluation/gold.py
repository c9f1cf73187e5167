"""A policy measured against a known reward and its reference, on its own samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenratio.evaluation.generation import Sample, eval_mode


@dataclass(frozen=True)
class Estimate:
    """A mean over responses.

    Attributes:
        mean: over all responses.
        standard_error: of the mean, prompts taken as the independent draws; nan for one prompt.
        num: responses.
    """

    mean: float
    standard_error: float
    num: int


def summarize_policy(
    model: nn.Module,
    ref_model: nn.Module,
    samples: Sequence[Sequence[Sample]],
    reward_fn: Callable[[str], float],
    *,
    has_insult: Callable[[str], bool] | None = None,
    batch_size: int = 32,
) -> dict[str, Estimate]:
    """What alignment changed: reward, distance from the reference, diversity, length.

    Args:
        model: the policy the samples come from; drawn at temperature 1 with all tokens kept, else
            KL and entropy are not those of the policy.
        samples: for each prompt its samples, as `sample_responses` returns them.
        reward_fn: gold reward of a response's text.
        has_insult: whether a text insults; adds `insult_share`.
        batch_size: rows in one forward pass of both models; bounds the memory for logits.

    Returns:
        `gold_reward`; `kl_policy_ref`, the sequence KL(π ‖ π_ref) in nats per response, each step's
        KL exact over the vocabulary, the states sampled; `entropy`, the mean of a response's token
        entropies in nats; `length` in tokens, EOS included; `insult_share`.
    """
    rows = [sample for group in samples for sample in group]
    if not rows:
        raise ValueError("no samples to summarize")
    kl, entropy = _kl_and_entropy(model, ref_model, rows, batch_size)
    values = {
        "gold_reward": [reward_fn(sample.text) for sample in rows],
        "kl_policy_ref": kl,
        "entropy": entropy,
        "length": [float(len(sample.response_ids)) for sample in rows],
    }
    if has_insult is not None:
        values["insult_share"] = [float(has_insult(sample.text)) for sample in rows]
    sizes = [len(group) for group in samples]
    return {name: clustered_mean(value, sizes) for name, value in values.items()}


def clustered_mean(values: Sequence[float], sizes: Sequence[int]) -> Estimate:
    """Mean of values that come in groups, the groups independent, values of one group perhaps not.

    The standard error is that of the ratio of the groups' sums to their sizes, cluster-robust: with
    groups of one value, the usual sd / √n.

    >>> clustered_mean([1.0, 2.0, 3.0], [1, 1, 1])
    Estimate(mean=2.0, standard_error=0.5773502691896257, num=3)
    """
    num, groups = len(values), [size for size in sizes if size]
    mean = math.fsum(values) / num
    squares, begin = [], 0
    for size in groups:
        squares.append(math.fsum(value - mean for value in values[begin : begin + size]) ** 2)
        begin += size
    if len(groups) < 2:
        return Estimate(mean, math.nan, num)
    variance = math.fsum(squares) * len(groups) / (len(groups) - 1) / num**2
    return Estimate(mean, math.sqrt(variance), num)


def _kl_and_entropy(
    model: nn.Module, ref_model: nn.Module, rows: Sequence[Sample], batch_size: int
) -> tuple[list[float], list[float]]:
    """Each row's Σ_t KL(π(.|s_t) ‖ π_ref(.|s_t)), and its mean over t of π(.|s_t)'s entropy."""
    kl, entropy = [0.0] * len(rows), [0.0] * len(rows)
    lengths = [len(sample.prompt_ids) + len(sample.response_ids) for sample in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)  # little padding within a batch
    with torch.no_grad(), eval_mode(model, ref_model):
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            picked = [rows[index] for index in batch]
            log_probs = _state_log_probs(model, picked)
            ref_log_probs = _state_log_probs(ref_model, picked)
            for index, log_p, ref_log_p in zip(batch, log_probs, ref_log_probs, strict=True):
                kl[index] = _kl(log_p, ref_log_p).sum().item()
                entropy[index] = torch.special.entr(log_p.exp()).sum(-1).mean().item()
    return kl, entropy


def _kl(
    log_p: Float[Tensor, "steps vocabulary"], ref_log_p: Float[Tensor, "steps vocabulary"]
) -> Float[Tensor, "steps"]:
    """KL(π ‖ π_ref) = Σ (p d − p + p_ref), d = log(p / p_ref): no term is negative (METHOD §5)."""
    difference = log_p - ref_log_p
    prob = log_p.exp()
    plain = prob * difference - prob + ref_log_p.exp()
    # where the policies are close, −p + p_ref cancels; far apart, e^−d overflows
    close = difference.clamp(-1.0, 1.0)
    return torch.where(close == difference, prob * (torch.expm1(-close) + close), plain).sum(-1)


def _state_log_probs(
    model: nn.Module, rows: Sequence[Sample]
) -> list[Float[Tensor, "steps vocabulary"]]:
    """log π(.|s_t) at each token of each response, float32 at least."""
    device = next(model.parameters()).device
    length = max(len(row.prompt_ids) + len(row.response_ids) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        ids = torch.tensor(row.prompt_ids + row.response_ids)
        input_ids[index, : len(ids)] = ids
        attention_mask[index, : len(ids)] = 1
    output = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
    log_probs = []
    for row, logits in zip(rows, output.logits, strict=True):
        begin = len(row.prompt_ids) - 1  # the state before a token is one position to its left
        states = logits[begin : begin + len(row.response_ids)]
        dtype = torch.promote_types(states.dtype, torch.float32)
        log_probs.append(states.to(dtype).log_softmax(-1))
    return log_probs
