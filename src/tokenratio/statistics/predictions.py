"""What models predict at a state: the entropy of a distribution, and the likeliest tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenratio.statistics.chunks import default_chunk_size
from tokenratio.statistics.head import Head, compute_dtype, product_dtype


@dataclass(frozen=True)
class Predictions:
    """Of a policy and a reference at each state.

    Attributes:
        entropy: of the policy's distribution, in nats.
        ids: the `top` likeliest tokens of the policy, then those of the reference, each from the
            likeliest down; a token that is among both stands there twice.
        log_probs, ref_log_probs: their log-probabilities under either model, in nats.
    """

    entropy: Float[Tensor, "tokens"]
    ids: Int[Tensor, "tokens twice_top"]
    log_probs: Float[Tensor, "tokens twice_top"]
    ref_log_probs: Float[Tensor, "tokens twice_top"]


def predictions(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    ref_hidden: Float[Tensor, "tokens ref_hidden"],
    ref_head: Head,
    *,
    top: int,
    chunk_size: int | None = None,
) -> Predictions:
    """Entropy and likeliest tokens, holding the logits of one chunk of states at a time.

    Args:
        hidden, ref_hidden: final hidden states of policy and reference.
        top: tokens of each model, ≥ 0; at most the whole vocabulary.
        chunk_size: states whose logits are held at once; chosen from the vocabulary if None.
    """
    top = min(top, len(head.weight))
    parts: list[tuple[Tensor, ...]] = []
    of_both = (
        logits_in_chunks(hidden, head, chunk_size),
        logits_in_chunks(ref_hidden, ref_head, chunk_size),
    )
    for (_, logits), (_, ref_logits) in zip(*of_both, strict=True):
        likeliest = [each.topk(top).indices for each in (logits, ref_logits)]
        ids = torch.cat(likeliest, dim=1)
        log_probs = [
            each.gather(1, ids) - each.logsumexp(-1, keepdim=True) for each in (logits, ref_logits)
        ]
        parts.append((entropy(logits), ids, *log_probs))
    if not parts:
        empty, none = hidden.new_empty(0), hidden.new_empty(0, 2 * top)
        return Predictions(empty, none.long(), none, none)
    return Predictions(*(torch.cat(part) for part in zip(*parts, strict=True)))


def logits_in_chunks(
    hidden: Float[Tensor, "tokens hidden"], head: Head, chunk_size: int | None = None
) -> Iterator[tuple[slice, Float[Tensor, "chunk vocabulary"]]]:
    """Which states, and their logits, in float32 or wider; the next chunk overwrites them.

    Args:
        chunk_size: states of a chunk; chosen from the vocabulary if None.
    """
    vocabulary = len(head.weight)
    chunk_size = chunk_size or default_chunk_size(vocabulary, hidden.device.type)
    dtype = compute_dtype(hidden, head.weight)
    factors = product_dtype(dtype, head.weight)
    head = head.to(factors)
    space = hidden.new_empty(min(chunk_size, len(hidden)), vocabulary, dtype=dtype)
    for start in range(0, len(hidden), chunk_size):
        states = slice(start, start + chunk_size)
        yield states, head.write_logits(hidden[states].to(factors), space)


def entropy(logits: Float[Tensor, "tokens vocabulary"]) -> Float[Tensor, "tokens"]:
    """Entropy of the distribution at each state, in nats."""
    # `entr` is 0 for a probability of 0, where log-probabilities of −inf would give nan
    terms: Tensor = torch.special.entr(logits.softmax(-1))
    return terms.sum(-1)
