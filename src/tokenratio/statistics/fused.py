"""The chunked implementation: no logits outlive their chunk, forward or backward."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenratio.statistics.chunks import distributions, logit_gradient, softmax
from tokenratio.statistics.head import Head, add_product, compute_dtype, product, product_dtype
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
        factors = product_dtype(dtype, weight)
        log_probs = hidden.new_empty(len(labels), dtype=dtype)
        ref_log_probs = None if ref_hidden is None else torch.empty_like(log_probs)
        kl = torch.empty_like(log_probs) if with_kl else None
        with torch.autocast(hidden.device.type, enabled=False):
            policy = Head(weight, bias, softcap).to(factors)
            ref_head = reference if ref_hidden is None else reference.to(factors)
            space = log_probs.new_empty(min(chunk_size, len(labels)), len(weight))
            ref_space = None if ref_hidden is None else torch.empty_like(space)
            for start in range(0, len(labels), chunk_size):
                rows = slice(start, start + chunk_size)
                ref_logits = None
                if ref_hidden is not None and ref_space is not None:
                    ref_logits = ref_head.write_logits(ref_hidden[rows].to(factors), ref_space)
                logits = policy.write_logits(hidden[rows].to(factors), space)
                of_labels = distributions(logits, ref_logits, labels[rows], with_kl=with_kl)
                for whole, part in zip((log_probs, ref_log_probs, kl), of_labels, strict=True):
                    if whole is not None and part is not None:
                        whole[rows] = part
        ctx.save_for_backward(
            hidden, weight, bias, labels, ref_hidden, reference.weight, reference.bias
        )
        ctx.softcaps = softcap, reference.softcap
        ctx.chunk_size, ctx.factors = chunk_size, factors
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
        factors = ctx.factors  # autocast is over by now
        if grad_log_probs is None:
            assert grad_kl is not None
            grad_log_probs = torch.zeros_like(grad_kl)
        softcap, ref_softcap = ctx.softcaps
        with torch.autocast(hidden.device.type, enabled=False):
            policy = Head(weight, bias, softcap).to(factors)
            reference = Head(ref_weight, ref_bias, ref_softcap)
            if grad_kl is not None:
                reference = reference.to(factors)
            d_hidden = torch.empty_like(hidden) if needs_hidden else None
            d_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
            d_bias = weight.new_zeros(len(weight), dtype=dtype) if needs_bias else None
            longest = min(ctx.chunk_size, len(labels))
            space = hidden.new_empty(longest, len(weight), dtype=dtype)
            ref_space = None if grad_kl is None else torch.empty_like(space)
            for start in range(0, len(labels), ctx.chunk_size):
                rows = slice(start, start + ctx.chunk_size)
                states = hidden[rows].to(factors)
                probs = policy.write_logits(states, space)
                slack = None if softcap is None else 1 - (probs / softcap).square_()
                softmax(probs)
                ref_probs = None
                if ref_space is not None:
                    ref_probs = reference.write_logits(ref_hidden[rows].to(factors), ref_space)
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
                d_logits = d_logits.to(factors)
                if d_hidden is not None:
                    d_hidden[rows] = product(d_logits, policy.weight).to(hidden.dtype)
                if d_weight is not None:
                    add_product(d_weight, d_logits.T, states)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 6,
        )
