"""Hidden states to log-probabilities and KL of policy and reference, without keeping logits."""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from tokenratio.statistics.chunks import default_chunk_size
from tokenratio.statistics.fused import fused_token_statistics
from tokenratio.statistics.head import Head
from tokenratio.statistics.reference import reference_token_statistics
from tokenratio.statistics.steps import (
    StepInputs,
    StepLoss,
    fused_step_losses,
    reference_step_losses,
)
from tokenratio.types import StepLosses, TokenStatistics

__all__ = ["Head", "StepLoss", "head_statistics", "step_losses", "token_statistics"]

Implementation = Literal["fused", "reference"]


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
    impl: Implementation = "fused",
    chunk_size: int | None = None,
) -> TokenStatistics:
    """Log-probabilities of `labels` under both models, and KL(π_ref ‖ π) per state.

    Gradients flow to `hidden`, `weight` and `bias`; the reference is a constant. Logits and
    reductions are float32 at least, whatever the inputs' dtype (bfloat16 logits bias a log-ratio by
    6e-3); float64 stays float64. Works for any number of tokens, zero included
    (docs/method.md §5).

    Args:
        hidden: the policy's final hidden states, one per predicted token.
        weight: the weight of the policy's output head; `bias` its bias.
        labels: the token each state predicts, in [0, vocabulary).
        ref_hidden: the reference's hidden states for the same tokens.
        ref_weight: the weight of the reference's head; by default, if `ref_hidden` is given, the
            policy's own head as a constant.
        logit_softcap: c in `c·tanh(logits/c)` (Gemma 2), for both models.
        with_kl: also compute `kl_ref_policy`, exactly, over the whole vocabulary.
        impl: `fused` goes through the tokens in chunks, forward and backward, and keeps no logits;
            `reference` holds whole logits, as a readable version to test against.
        chunk_size: tokens per chunk of the fused implementation; chosen from the vocabulary if
            None.
    Raises:
        ValueError: shapes that do not fit, a KL without a reference, a soft-cap or chunk size ≤ 0.
    """
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        raise ValueError("ref_weight and ref_bias need ref_hidden")
    head = Head(weight, bias, logit_softcap)
    if ref_weight is None:
        ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
    ref_head = Head(ref_weight, ref_bias, logit_softcap)
    return head_statistics(
        hidden,
        head,
        labels,
        ref_hidden,
        ref_head,
        with_kl=with_kl,
        impl=impl,
        chunk_size=chunk_size,
    )


def head_statistics(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    labels: Int[Tensor, "tokens"],
    ref_hidden: Float[Tensor, "tokens ref_hidden"] | None = None,
    ref_head: Head | None = None,
    *,
    with_kl: bool = False,
    impl: Implementation = "fused",
    chunk_size: int | None = None,
) -> TokenStatistics:
    """`token_statistics` for heads as objects.

    Args:
        ref_head: the reference's head; None for the policy's own, as a constant.
    """
    if with_kl and ref_hidden is None:
        raise ValueError("with_kl needs ref_hidden: the KL compares the policy with a reference")
    ref_head = (ref_head or head).detach()
    ref_hidden = _checked(hidden, head, labels, ref_hidden, ref_head, chunk_size)
    if impl == "reference":
        return reference_token_statistics(
            hidden, head, labels, ref_hidden, ref_head, with_kl=with_kl
        )
    if impl == "fused":
        return fused_token_statistics(
            hidden,
            head,
            labels,
            ref_hidden,
            ref_head,
            with_kl=with_kl,
            chunk_size=chunk_size or _default_chunk_size(head),
        )
    raise ValueError(f"impl must be 'fused' or 'reference', not {impl!r}")


def step_losses(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    labels: Int[Tensor, "tokens"],
    step_loss: StepLoss,
    step_weight: Float[Tensor, "steps"],
    ref_hidden: Float[Tensor, "tokens ref_hidden"] | None = None,
    ref_head: Head | None = None,
    *,
    ref_log_probs: Float[Tensor, "tokens"] | None = None,
    log_state_weight: Float[Tensor, "steps"] | None = None,
    with_kl: bool = False,
    impl: Implementation = "fused",
    chunk_size: int | None = None,
) -> StepLosses:
    """A loss that looks at one step at a time, and its gradients, in one pass (docs/method.md §5).

    A step compares two tokens. All `tokens` arrays hold the chosen token of every step, then the
    rejected token of every step in the same order. Gradients flow from `total` to `hidden`, the
    head and `log_state_weight`; the fused implementation forms them together with the loss, so
    backward can run once. Numerics are those of `token_statistics`.

    Args:
        step_loss: from the statistics of any number of steps to the loss of each, differentiably;
            it must not mix steps.
        step_weight: the weight of each step's loss in `total`.
        ref_head: the reference's head; None for the policy's own, as a constant.
        ref_log_probs: log π_ref of the labels where it is known already; the reference's logits are
            then formed only for the KL.
        log_state_weight: log w_t for `step_loss` to use (a learned baseline's), before β.
        chunk_size: tokens per chunk of the fused implementation, counting both of a step.
            The other arguments are those of `token_statistics`.
    Raises:
        ValueError: shapes that do not fit, no reference, a soft-cap or chunk size ≤ 0.
    """
    if ref_hidden is None and (with_kl or ref_log_probs is None):
        raise ValueError("step_losses needs ref_hidden, or ref_log_probs for a loss without KL")
    ref_head = (ref_head or head).detach()
    ref_hidden = _checked(hidden, head, labels, ref_hidden, ref_head, chunk_size)
    for name, value, size in (
        ("ref_log_probs", ref_log_probs, len(labels)),
        ("log_state_weight", log_state_weight, len(labels) / 2),
        ("step_weight", step_weight, len(labels) / 2),
    ):
        if value is not None and value.shape != (size,):
            raise ValueError(
                f"{name} has shape {list(value.shape)}: {len(labels)} labels make "
                f"{len(labels) / 2:g} steps of two"
            )
    inputs = StepInputs(
        hidden,
        head,
        labels,
        step_loss,
        step_weight,
        ref_hidden,
        ref_head,
        ref_log_probs,
        log_state_weight,
        with_kl,
    )
    if impl == "reference":
        return reference_step_losses(inputs)
    if impl == "fused":
        chunk_size = chunk_size or _default_chunk_size(head)
        return fused_step_losses(inputs, chunk_steps=max(1, chunk_size // 2))
    raise ValueError(f"impl must be 'fused' or 'reference', not {impl!r}")


def _default_chunk_size(head: Head) -> int:
    return default_chunk_size(len(head.weight), head.weight.device.type)


def _checked(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    ref_hidden: Tensor | None,
    ref_head: Head,
    chunk_size: int | None,
) -> Tensor | None:
    """`ref_hidden` as a constant, once all shapes are known to fit."""
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"logit_softcap must be positive, not {head.softcap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    head.check_fits(hidden, labels, "hidden", "weight")
    if ref_hidden is None:
        return None
    ref_head.check_fits(ref_hidden, labels, "ref_hidden", "ref_weight")
    if len(ref_head.weight) != len(head.weight):
        raise ValueError(
            f"policy and reference need one vocabulary: weight has {len(head.weight)} rows, "
            f"ref_weight {len(ref_head.weight)}"
        )
    return ref_hidden.detach()
