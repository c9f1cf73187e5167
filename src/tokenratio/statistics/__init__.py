"""From hidden states to what policy and reference say of each token, without keeping logits."""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from tokenratio.statistics.fused import fused_token_statistics
from tokenratio.statistics.head import Head
from tokenratio.statistics.reference import reference_token_statistics
from tokenratio.types import TokenStatistics

__all__ = ["token_statistics"]


def token_statistics(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    labels: Int[Tensor, "tokens"],
    ref_hidden: Float[Tensor, "tokens ref_hidden"] | None = None,
    ref_weight: Float[Tensor, "vocabulary ref_hidden"] | None = None,
    *,
    bias: Float[Tensor, "vocabulary"] | None = None,
    ref_bias: Float[Tensor, "vocabulary"] | None = None,
    logit_softcap: float | None = None,
    with_kl: bool = False,
    impl: Literal["fused", "reference"] = "fused",
    chunk_size: int | None = None,
) -> TokenStatistics:
    """Log-probabilities of `labels` under both models, and KL(π_ref ‖ π) per state (METHOD §5).

    Gradients flow to `hidden`, `weight` and `bias`; the reference is a constant. Logits and
    reductions are float32 at least, whatever the inputs' dtype (bfloat16 logits bias a log-ratio by
    6e-3); float64 stays float64. Works at any number of tokens, none included.

    Args:
        hidden: the policy's final hidden states, one per predicted token.
        weight: the policy's output head; `bias` its bias.
        labels: the token each state predicts, in [0, vocabulary).
        ref_hidden: the reference's hidden states for the same tokens.
        ref_weight: the reference's head; when only `ref_hidden` is given, the policy's own head and
            bias, as constants.
        logit_softcap: c in `c·tanh(logits/c)` (Gemma 2), for both models.
        with_kl: also compute `kl_ref_policy`, exactly, over the whole vocabulary.
        impl: `fused` goes through the tokens in chunks, forward and backward, and keeps no logits;
            `reference` holds whole logits, to be read and to test against.
        chunk_size: tokens per chunk of the fused implementation; chosen from the vocabulary if
            None.
    Raises:
        ValueError: shapes that do not fit, a KL without a reference, a soft-cap or chunk size ≤ 0.
    """
    if with_kl and ref_hidden is None:
        raise ValueError("with_kl needs ref_hidden: the KL compares the policy with a reference")
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        raise ValueError("ref_weight and ref_bias need ref_hidden")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap must be positive, not {logit_softcap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    policy = Head(weight, bias, logit_softcap)
    if ref_weight is None:
        ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
    reference = Head(
        ref_weight.detach(), None if ref_bias is None else ref_bias.detach(), logit_softcap
    )
    policy.check_fits(hidden, labels, "hidden", "weight")
    if ref_hidden is not None:
        ref_hidden = ref_hidden.detach()
        reference.check_fits(ref_hidden, labels, "ref_hidden", "ref_weight")
        if with_kl and ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"the KL needs one vocabulary: weight has {weight.shape[0]} rows, "
                f"ref_weight {ref_weight.shape[0]}"
            )
    if impl == "reference":
        return reference_token_statistics(
            hidden, policy, labels, ref_hidden, reference, with_kl=with_kl
        )
    if impl == "fused":
        return fused_token_statistics(
            hidden, policy, labels, ref_hidden, reference, with_kl=with_kl, chunk_size=chunk_size
        )
    raise ValueError(f"impl must be 'fused' or 'reference', not {impl!r}")
