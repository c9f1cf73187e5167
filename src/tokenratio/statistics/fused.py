"""The chunked implementation: no logits outlive their chunk, forward or backward."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenratio.statistics.head import Head, compute_dtype, gather_labels, kl_terms
from tokenratio.types import TokenStatistics

# Elements of one chunk's logits: large enough for efficient products, small beside the head itself.
_CHUNK_ELEMENTS = 2**23


def fused_token_statistics(
    hidden: Float[Tensor, "tokens hidden"],
    policy: Head,
    labels: Int[Tensor, "tokens"],
    ref_hidden: Float[Tensor, "tokens ref_hidden"] | None,
    reference: Head,
    *,
    with_kl: bool,
    chunk_size: int | None,
) -> TokenStatistics:
    """`token_statistics` in chunks over tokens.

    Beyond inputs and gradients it holds one chunk's logits and, where the heads are narrower than
    float32, their float32 copies.
    """
    if chunk_size is None:
        chunk_size = max(16, _CHUNK_ELEMENTS // policy.weight.shape[0])
    log_probs, ref_log_probs, kl = _TokenStatisticsFunction.apply(  # type: ignore[no-untyped-call]
        hidden,
        policy.weight,
        policy.bias,
        labels,
        ref_hidden,
        reference.weight,
        reference.bias,
        policy.softcap,
        with_kl,
        chunk_size,
    )
    return TokenStatistics(log_probs, ref_log_probs, kl)


class _TokenStatisticsFunction(torch.autograd.Function):
    """Forward keeps each token's log-partition; backward recomputes the logits (METHOD §5):

    `dlogits = g_logp (onehot − p) + g_KL (p − p_ref)`, times `1 − (z/c)²` under a soft-cap.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ref_hidden: Tensor | None,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        softcap: float | None,
        with_kl: bool,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dtype = compute_dtype(hidden, weight, ref_hidden)
        log_probs = hidden.new_empty(len(labels), dtype=dtype)
        log_z = torch.empty_like(log_probs)
        ref_log_probs = None if ref_hidden is None else torch.empty_like(log_probs)
        ref_log_z = None if ref_hidden is None else torch.empty_like(log_probs)
        kl = torch.empty_like(log_probs) if with_kl else None
        with torch.autocast(hidden.device.type, enabled=False):
            policy = Head(weight, bias, softcap).to(dtype)
            reference = Head(ref_weight, ref_bias, softcap)
            if ref_hidden is not None:
                reference = reference.to(dtype)
            for start in range(0, len(labels), chunk_size):
                rows = slice(start, start + chunk_size)
                chunk = policy.logits(hidden[rows].to(dtype))
                log_z[rows] = chunk.logsumexp(-1)
                chunk -= log_z[rows, None]
                log_probs[rows] = gather_labels(chunk, labels[rows])
                if ref_hidden is None:
                    continue
                assert ref_log_probs is not None
                assert ref_log_z is not None
                ref_chunk = reference.logits(ref_hidden[rows].to(dtype))
                ref_log_z[rows] = ref_chunk.logsumexp(-1)
                ref_chunk -= ref_log_z[rows, None]
                ref_log_probs[rows] = gather_labels(ref_chunk, labels[rows])
                if kl is not None:
                    kl[rows] = kl_terms(chunk, ref_chunk).sum(-1)
        ctx.save_for_backward(
            hidden, weight, bias, labels, log_z, ref_hidden, ref_weight, ref_bias, ref_log_z
        )
        ctx.softcap, ctx.chunk_size = softcap, chunk_size
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
            return (None,) * 10
        hidden, weight, bias, labels, log_z, ref_hidden, ref_weight, ref_bias, ref_log_z = (
            ctx.saved_tensors
        )
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = log_z.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            policy = Head(weight, bias, ctx.softcap).to(dtype)
            reference = Head(ref_weight, ref_bias, ctx.softcap)
            if grad_kl is not None:
                reference = reference.to(dtype)
            d_hidden = torch.empty_like(hidden) if needs_hidden else None
            d_weight = torch.zeros_like(policy.weight) if needs_weight else None
            d_bias = weight.new_zeros(len(weight), dtype=dtype) if needs_bias else None
            for start in range(0, len(labels), ctx.chunk_size):
                rows = slice(start, start + ctx.chunk_size)
                hidden_rows = hidden[rows].to(dtype)
                logits = policy.logits(hidden_rows)
                d_logits = (logits - log_z[rows, None]).exp_()
                coefficient = log_z.new_zeros(len(hidden_rows), 1)
                if grad_kl is not None:
                    coefficient += grad_kl[rows, None]
                if grad_log_probs is not None:
                    coefficient -= grad_log_probs[rows, None]
                d_logits *= coefficient
                if grad_log_probs is not None:
                    d_logits.scatter_add_(1, labels[rows, None], grad_log_probs[rows, None])
                if grad_kl is not None:
                    ref_logits = reference.logits(ref_hidden[rows].to(dtype))
                    ref_probs = ref_logits.sub_(ref_log_z[rows, None]).exp_()
                    d_logits -= ref_probs.mul_(grad_kl[rows, None])
                if ctx.softcap is not None:
                    d_logits *= 1 - (logits / ctx.softcap).square_()
                if d_hidden is not None:
                    d_hidden[rows] = (d_logits @ policy.weight).to(hidden.dtype)
                if d_weight is not None:
                    d_weight.addmm_(d_logits.T, hidden_rows)
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 7,
        )
