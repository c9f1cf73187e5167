"""The readable implementation: whole logits, autograd. What the fused one is held to."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenratio.statistics.head import Head, compute_dtype, gather_labels, kl_terms
from tokenratio.types import TokenStatistics


def reference_token_statistics(
    hidden: Float[Tensor, "tokens hidden"],
    policy: Head,
    labels: Int[Tensor, "tokens"],
    ref_hidden: Float[Tensor, "tokens ref_hidden"] | None,
    reference: Head,
    *,
    with_kl: bool,
) -> TokenStatistics:
    """`token_statistics` with the logits of both models in memory, `[tokens, vocabulary]` each."""
    dtype = compute_dtype(hidden, policy.weight, ref_hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        log_probs = policy.to(dtype).logits(hidden.to(dtype)).log_softmax(-1)
        of_labels = gather_labels(log_probs, labels)
        if ref_hidden is None:
            return TokenStatistics(of_labels)
        ref_log_probs = reference.to(dtype).logits(ref_hidden.to(dtype)).log_softmax(-1)
        kl = kl_terms(log_probs, ref_log_probs).sum(-1) if with_kl else None
        return TokenStatistics(of_labels, gather_labels(ref_log_probs, labels), kl)
