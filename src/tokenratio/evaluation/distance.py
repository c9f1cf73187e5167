"""How far a policy's samples are from its reference: KL, and their loss under the reference."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenratio.models.packing import model_inputs
from tokenratio.models.token_requests import TokenRequest, language_model, own_head
from tokenratio.models.token_rows import TokenRow, hidden_states, score_rows
from tokenratio.statistics.chunks import default_chunk_size
from tokenratio.statistics.head import Head, compute_dtype
from tokenratio.types import CompletionBatch


def kl_policy_ref(
    model: nn.Module,
    ref_model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    batch_size: int,
    chunk_size: int | None = None,
) -> list[float]:
    """The sequence KL(π ‖ π_ref) of each row in nats, exact over the vocabulary at each step.

    Its mean over samples from the policy is the policy's KL.

    Args:
        batch_size: rows in one forward pass.
        chunk_size: tokens whose logits of both models are held at once, in float32 or wider;
            chosen from the vocabulary's size if None.
    """

    def kl(batch: CompletionBatch) -> list[float]:
        hidden = hidden_states(model, batch), hidden_states(ref_model, batch)
        heads = own_head(model), own_head(ref_model)
        of_tokens = batch.align(_kl_of_states(hidden, heads, chunk_size)).double()
        return of_tokens.sum(-1).tolist()

    return score_rows([model, ref_model], rows, kl, batch_size=batch_size)


def mean_token_losses(
    model: nn.Module, rows: Sequence[TokenRow], *, batch_size: int
) -> list[float]:
    """Mean −log p of each row's response tokens, EOS included, in nats; nan for an empty response.

    Args:
        batch_size: rows in one forward pass.
    """

    def losses(batch: CompletionBatch) -> list[float]:
        inputs = model_inputs(batch, language_model(model))
        answer = model(**inputs, token_request=TokenRequest(batch.states, batch.labels))
        sums = -batch.align(answer["log_probs"]).double().sum(-1)
        return (sums / batch.response_mask.sum(-1)).tolist()

    return score_rows([model], rows, losses, batch_size=batch_size)


def _kl_of_states(
    hidden: tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "tokens ref_hidden"]],
    heads: tuple[Head, Head],
    chunk_size: int | None,
) -> Float[Tensor, "tokens"]:
    chunk_size = chunk_size or default_chunk_size(len(heads[0].weight), hidden[0].device.type)
    dtype = compute_dtype(hidden[0], heads[0].weight, hidden[1])
    policy, reference = (head.to(dtype) for head in heads)
    kl = hidden[0].new_empty(len(hidden[0]), dtype=dtype)
    for start in range(0, len(kl), chunk_size):
        states = slice(start, start + chunk_size)
        kl[states] = _kl(
            policy.logits(hidden[0][states].to(dtype)).log_softmax(-1),
            reference.logits(hidden[1][states].to(dtype)).log_softmax(-1),
        )
    return kl


def _kl(
    log_p: Float[Tensor, "steps vocabulary"], ref_log_p: Float[Tensor, "steps vocabulary"]
) -> Float[Tensor, "steps"]:
    """KL(π ‖ π_ref) = Σ (p d − p + p_ref), d = log(p / p_ref): no term is negative.

    docs/method.md §5.
    """
    difference = log_p - ref_log_p
    prob = log_p.exp()
    plain = prob * difference - prob + ref_log_p.exp()
    # If the policies are close, −p + p_ref cancels; if they are far apart, e^−d overflows.
    close = difference.clamp(-1.0, 1.0)
    return torch.where(close == difference, prob * (torch.expm1(-close) + close), plain).sum(-1)
