"""Losses that are local to their step, in one pass that keeps no logits."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenratio.statistics.chunks import distributions, logit_gradient
from tokenratio.statistics.head import Head, compute_dtype
from tokenratio.statistics.products import Precision, Products
from tokenratio.statistics.reference import reference_token_statistics
from tokenratio.types import StepLosses, StepStatistics, TokenStatistics

StepLoss = Callable[[StepStatistics], Float[Tensor, "steps"]]


@dataclass(frozen=True)
class StepInputs:
    """The arguments of `step_losses`, with shapes checked."""

    hidden: Float[Tensor, "tokens hidden"]
    policy: Head
    labels: Int[Tensor, "tokens"]
    step_loss: StepLoss
    step_weight: Float[Tensor, "steps"]
    ref_hidden: Float[Tensor, "tokens ref_hidden"] | None
    reference: Head
    ref_log_probs: Float[Tensor, "tokens"] | None
    log_state_weight: Float[Tensor, "steps"] | None
    with_kl: bool


def fused_step_losses(inputs: StepInputs, *, chunk_steps: int) -> StepLosses:
    """`step_losses` with gradients formed in the forward pass (docs/method.md §5, token locality).

    Chunks hold both tokens of their steps, so the loss's slope is known as soon as their logits
    are, and d hidden and d weight follow at once: two products for the logits, two for the
    gradients. Besides inputs and gradients it holds one chunk's logits of each model.
    """
    policy = inputs.policy
    total, per_step, *tokens = _StepLossesFunction.apply(  # type: ignore[no-untyped-call]
        inputs.hidden,
        policy.weight,
        policy.bias,
        inputs.log_state_weight,
        policy.softcap,
        inputs.labels,
        inputs.step_weight,
        inputs.ref_hidden,
        inputs.reference,
        inputs.ref_log_probs,
        inputs.step_loss,
        inputs.with_kl,
        chunk_steps,
        # Inside forward, grad mode is always off, and needs_input_grad ignores no_grad.
        torch.is_grad_enabled(),
    )
    return StepLosses(total, per_step, TokenStatistics(*tokens))


def reference_step_losses(inputs: StepInputs) -> StepLosses:
    """`step_losses` with whole logits and autograd: a readable version to test against."""
    tokens = reference_token_statistics(
        inputs.hidden,
        inputs.policy,
        inputs.labels,
        inputs.ref_hidden,
        inputs.reference,
        with_kl=inputs.with_kl,
    )
    log_probs, kl = tokens.log_probs, tokens.kl_ref_policy
    known = inputs.ref_log_probs
    ref_log_probs = tokens.ref_log_probs if known is None else known.to(log_probs.dtype)
    assert ref_log_probs is not None
    log_ratio = (log_probs - ref_log_probs).reshape(2, -1)
    of_steps = None if kl is None else kl.reshape(2, -1)
    per_step = inputs.step_loss(step_statistics(log_ratio, of_steps, inputs.log_state_weight))
    detached = TokenStatistics(
        log_probs.detach(), ref_log_probs, None if kl is None else kl.detach()
    )
    return StepLosses((per_step * inputs.step_weight).sum(), per_step.detach(), detached)


def step_statistics(
    log_ratio: Float[Tensor, "2 steps"],
    kl: Float[Tensor, "2 steps"] | None,
    log_state_weight: Float[Tensor, "steps"] | None,
) -> StepStatistics:
    """The statistics of steps from those of their chosen and their rejected tokens."""
    chosen_kl, rejected_kl = (None, None) if kl is None else kl.unbind()
    chosen, rejected = log_ratio.unbind()
    return StepStatistics(chosen, rejected, chosen_kl, rejected_kl, log_state_weight)


class _StepLossesFunction(torch.autograd.Function):
    """Forward computes the gradients of the total; backward scales them by its own gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_state_weight: Tensor | None,
        softcap: float | None,
        labels: Tensor,
        step_weight: Tensor,
        ref_hidden: Tensor | None,
        reference: Head,
        ref_log_probs: Tensor | None,
        step_loss: StepLoss,
        with_kl: bool,
        chunk_steps: int,
        needs_grad: bool,
    ) -> tuple[Tensor | None, ...]:
        dtype = compute_dtype(hidden, weight, ref_hidden)
        precision = Precision.of(dtype, weight)
        steps, width = len(step_weight), hidden.shape[1]
        needs_hidden, needs_weight, needs_bias, needs_state = (
            needs_grad and needed for needed in ctx.needs_input_grad[:4]
        )
        new = functools.partial(torch.empty, dtype=dtype, device=hidden.device)
        # The first index says which of the step's two tokens: 0 chosen, 1 rejected.
        labels, hidden = labels.reshape(2, steps), hidden.reshape(2, steps, width)
        needs_ref = with_kl or ref_log_probs is None
        log_probs, of_reference, per_step = new(2, steps), new(2, steps), new(steps)
        if ref_log_probs is not None:
            of_reference.copy_(ref_log_probs.reshape(2, steps))
        kl = new(2, steps) if with_kl else None
        d_hidden = new(2, steps, width) if needs_hidden else None
        d_weight = new(*weight.shape).zero_() if needs_weight else None
        d_bias = new(len(weight)).zero_() if needs_bias else None
        d_state = new(steps) if needs_state else None
        with torch.autocast(hidden.device.type, enabled=False):
            if needs_ref:
                assert ref_hidden is not None
                ref_hidden = ref_hidden.reshape(2, steps, ref_hidden.shape[1])
            products = Products(
                Head(weight, bias, softcap),
                reference if needs_ref else None,
                precision,
                2 * min(steps, chunk_steps),
            )
            for start in range(0, steps, chunk_steps):
                chunk = slice(start, start + chunk_steps)
                of_chunk = labels[:, chunk].flatten()
                states = hidden[:, chunk].flatten(0, 1)
                ref_states = None if ref_hidden is None else ref_hidden[:, chunk].flatten(0, 1)
                probs, ref_probs = products.write_logits(states, ref_states)
                slack = None if softcap is None else 1 - (probs / softcap).square_()
                of_labels, ref_of_labels, of_kl = distributions(
                    probs, ref_probs, of_chunk, with_kl=with_kl
                )
                log_probs[:, chunk] = of_labels.view(2, -1)
                if ref_log_probs is None and ref_of_labels is not None:
                    of_reference[:, chunk] = ref_of_labels.view(2, -1)
                if kl is not None and of_kl is not None:
                    kl[:, chunk] = of_kl.view(2, -1)
                of_steps = (
                    log_probs[:, chunk] - of_reference[:, chunk],
                    None if kl is None else kl[:, chunk],
                    None if log_state_weight is None else log_state_weight[chunk],
                )
                if not needs_grad:
                    per_step[chunk] = step_loss(step_statistics(*of_steps))
                    continue
                loss, d_log_probs, d_kl, d_log_weight = _slopes(
                    step_loss, *of_steps, step_weight[chunk]
                )
                per_step[chunk] = loss
                if d_state is not None and d_log_weight is not None:
                    d_state[chunk] = d_log_weight
                if d_hidden is None and d_weight is None and d_bias is None:
                    continue
                d_logits = logit_gradient(probs, ref_probs, of_chunk, d_log_probs, d_kl)
                if slack is not None:
                    d_logits *= slack
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
                if d_hidden is not None:
                    d_hidden[:, chunk] = products.d_hidden(d_logits).view(2, -1, width)
                if d_weight is not None:
                    products.add_d_weight(d_weight, d_logits, states)
        ctx.gradients = (d_hidden, d_weight, d_bias, d_state)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, None)]
        ctx.set_materialize_grads(False)
        total = (per_step * step_weight).sum()
        tokens = [None if x is None else x.flatten() for x in (log_probs, of_reference, kl)]
        ctx.mark_non_differentiable(per_step, *(x for x in tokens if x is not None))
        return total, per_step, *tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of step_losses are formed once; backward already ran")
        gradients, ctx.gradients = list(ctx.gradients), None
        if grad_total is None:
            return (None,) * 14
        for index, dtype in enumerate(ctx.dtypes):
            if gradients[index] is not None:
                gradients[index] = gradients[index].mul_(grad_total).to(dtype)
        d_hidden, d_weight, d_bias, d_state = gradients
        d_hidden = None if d_hidden is None else d_hidden.flatten(0, 1)
        return d_hidden, d_weight, d_bias, d_state, *(None,) * 10


def _slopes(
    step_loss: StepLoss,
    log_ratio: Float[Tensor, "2 steps"],
    kl: Float[Tensor, "2 steps"] | None,
    log_state_weight: Float[Tensor, "steps"] | None,
    step_weight: Float[Tensor, "steps"],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Each step's loss, and the derivatives of the weighted sum.

    Returns:
        The loss [steps]; the derivatives by log-ratio [tokens], KL [tokens] and log w [steps].
    """
    with torch.enable_grad():
        ratios, kls, weights = (
            None if value is None else value.detach().clone().requires_grad_()
            for value in (log_ratio, kl, log_state_weight)
        )
        assert ratios is not None
        loss = step_loss(step_statistics(ratios, kls, weights))
        leaves = [leaf for leaf in (ratios, kls, weights) if leaf is not None]
        slopes = iter(
            torch.autograd.grad((loss * step_weight).sum(), leaves, materialize_grads=True)
        )
    return (
        loss.detach(),
        next(slopes).flatten(),
        None if kls is None else next(slopes).flatten(),
        None if weights is None else next(slopes),
    )
