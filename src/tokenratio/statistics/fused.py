"""The chunked implementation: no logits outlive their chunk, forward or backward."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenratio.statistics.chunks import distributions, logit_gradient, softmax
from tokenratio.statistics.head import Head, compute_dtype
from tokenratio.statistics.products import Precision, Products
from tokenratio.types import TokenStatistics


def fused_token_statistics(
    hidden: Float[Tensor, "tokens hidden"],
    policy: Head,
    labels: Int[Tensor, "tokens"],
    ref_hidden: Float[Tensor, "tokens ref_hidden"] | None,
    reference: Head,
    *,
    with_kl: bool,
    chunk_size: int,
) -> TokenStatistics:
    """`token_statistics` in chunks over tokens.

    Besides inputs and gradients it holds one chunk's logits and, for heads narrower than float32,
    their float32 copies.
    """
    log_probs, ref_log_probs, kl = _TokenStatisticsFunction.apply(  # type: ignore[no-untyped-call]
        hidden,
        policy.weight,
        policy.bias,
        policy.softcap,
        labels,
        ref_hidden,
        reference,
        with_kl,
        chunk_size,
    )
    return TokenStatistics(log_probs, ref_log_probs, kl)


class _TokenStatisticsFunction(torch.autograd.Function):
    """Backward recomputes the logits (docs/method.md §5):

    `dlogits = g_logp (onehot − p) + g_KL (p − p_ref)`, times `1 − (z/c)²` under a soft-cap.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        labels: Tensor,
        ref_hidden: Tensor | None,
        reference: Head,
        with_kl: bool,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dtype = compute_dtype(hidden, weight, ref_hidden)
        precision = Precision.of(dtype, weight)
        log_probs = hidden.new_empty(len(labels), dtype=dtype)
        ref_log_probs = None if ref_hidden is None else torch.empty_like(log_probs)
        kl = torch.empty_like(log_probs) if with_kl else None
        with torch.autocast(hidden.device.type, enabled=False):
            products = Products(
                Head(weight, bias, softcap),
                None if ref_hidden is None else reference,
                precision,
                min(chunk_size, len(labels)),
            )
            for start in range(0, len(labels), chunk_size):
                rows = slice(start, start + chunk_size)
                ref_states = None if ref_hidden is None else ref_hidden[rows]
                logits, ref_logits = products.write_logits(hidden[rows], ref_states)
                of_labels = distributions(logits, ref_logits, labels[rows], with_kl=with_kl)
                for whole, part in zip((log_probs, ref_log_probs, kl), of_labels, strict=True):
                    if whole is not None and part is not None:
                        whole[rows] = part
        ctx.save_for_backward(
            hidden, weight, bias, labels, ref_hidden, reference.weight, reference.bias
        )
        ctx.softcaps = softcap, reference.softcap
        ctx.chunk_size, ctx.precision = chunk_size, precision
        ctx.set_materialize_grads(False)
        if ref_log_probs is not None:
            ctx.mark_non_differentiable(ref_log_probs)
        return log_probs, ref_log_probs, kl

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, _grad_ref: Tensor | None, grad_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_log_probs is None and grad_kl is None:
            return (None,) * 9
        hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = compute_dtype(hidden, weight, ref_hidden)
        if grad_log_probs is None:
            assert grad_kl is not None
            grad_log_probs = torch.zeros_like(grad_kl)
        softcap, ref_softcap = ctx.softcaps
        with torch.autocast(hidden.device.type, enabled=False):
            d_hidden = torch.empty_like(hidden) if needs_hidden else None
            d_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
            d_bias = weight.new_zeros(len(weight), dtype=dtype) if needs_bias else None
            products = Products(
                Head(weight, bias, softcap),
                None if grad_kl is None else Head(ref_weight, ref_bias, ref_softcap),
                ctx.precision,
                min(ctx.chunk_size, len(labels)),
            )
            for start in range(0, len(labels), ctx.chunk_size):
                rows = slice(start, start + ctx.chunk_size)
                ref_states = None if grad_kl is None else ref_hidden[rows]
                probs, ref_probs = products.write_logits(hidden[rows], ref_states)
                slack = None if softcap is None else 1 - (probs / softcap).square_()
                softmax(probs)
                if ref_probs is not None:
                    softmax(ref_probs)
                d_logits = logit_gradient(
                    probs,
                    ref_probs,
                    labels[rows],
                    grad_log_probs[rows],
                    None if grad_kl is None else grad_kl[rows],
                )
                if slack is not None:
                    d_logits *= slack
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
                if d_hidden is not None:
                    d_hidden[rows] = products.d_hidden(d_logits)
                if d_weight is not None:
                    products.add_d_weight(d_weight, d_logits, hidden[rows])
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 6,
        )
