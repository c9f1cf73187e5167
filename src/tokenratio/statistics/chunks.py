"""The elementwise work on a chunk of logits, between the matrix products."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenratio.statistics.head import gather_labels

# Elements of one chunk's logits: large enough for efficient products, small compared with the head;
# a GPU needs larger products to stay busy.
_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
# On a CPU the elementwise work runs in blocks of this size, which stay in its cache.
_BLOCK_ELEMENTS = 2**20

# log π and log π_ref of each label, KL(π_ref ‖ π) of its state.
Statistics = tuple[Tensor, Tensor | None, Tensor | None]


def default_chunk_size(vocabulary: int, device_type: str) -> int:
    """Tokens whose logits are held at once, for each of the two models."""
    elements = _CHUNK_ELEMENTS.get(device_type, _CHUNK_ELEMENTS["cpu"])
    return max(16, elements // vocabulary)


def distributions(
    logits: Float[Tensor, "tokens vocabulary"],
    ref_logits: Float[Tensor, "tokens vocabulary"] | None,
    labels: Int[Tensor, "tokens"],
    *,
    with_kl: bool,
) -> tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"] | None, Float[Tensor, "tokens"] | None]:
    """Log-probabilities of the labels and KL(π_ref ‖ π); distributions overwrite the logits.

    `logits` become π(.|s); with the KL `ref_logits` become π_ref(.|s), without it their values are
    undefined afterwards.

    Returns:
        `log_probs`, `ref_log_probs`, `kl` [tokens], None for those not asked for.
    """
    if _is_compiled(logits):
        whole: Statistics = _compiled(_distributions)(logits, ref_logits, labels, with_kl)
        return whole
    block = max(1, _BLOCK_ELEMENTS // logits.shape[1])
    parts = []
    for start in range(0, len(labels), block):
        rows = slice(start, start + block)
        of_rows = None if ref_logits is None else ref_logits[rows]
        parts.append(_distributions(logits[rows], of_rows, labels[rows], with_kl))
    log_probs, ref_log_probs, kl = zip(*parts, strict=True)
    return (
        torch.cat(log_probs),
        None if ref_logits is None else torch.cat(ref_log_probs),
        torch.cat(kl) if with_kl else None,
    )


def _distributions(
    logits: Tensor, ref_logits: Tensor | None, labels: Tensor, with_kl: bool
) -> Statistics:
    log_p = logits.log_softmax(-1)
    log_probs = gather_labels(log_p, labels)
    p = torch.exp(log_p, out=logits)
    if ref_logits is None:
        return log_probs, None, None
    log_q = ref_logits.log_softmax(-1)
    ref_log_probs = gather_labels(log_q, labels)
    if not with_kl:
        return log_probs, ref_log_probs, None
    # `kl_terms` in place: the half that holds for d ≥ 0, then the one for d < 0.
    q = torch.exp(log_q, out=ref_logits)
    difference = log_q.sub_(log_p)
    above = torch.clamp(difference, min=0, out=log_p)
    kl = torch.linalg.vecdot(q, torch.expm1(-above).add_(above))
    below = difference.clamp_(max=0)
    shrink = torch.expm1(below, out=log_p)
    rest = below - shrink
    kl += torch.linalg.vecdot(p, rest.addcmul_(below, shrink))
    return log_probs, ref_log_probs, kl


def softmax(logits: Float[Tensor, "tokens vocabulary"]) -> None:
    """Softmax of each row, in place and block by block."""
    block = len(logits) if _is_compiled(logits) else max(1, _BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), block):
        rows = logits[start : start + block]
        rows.copy_(rows.softmax(-1))


def logit_gradient(
    probs: Float[Tensor, "tokens vocabulary"],
    ref_probs: Float[Tensor, "tokens vocabulary"] | None,
    labels: Int[Tensor, "tokens"],
    grad_log_probs: Float[Tensor, "tokens"],
    grad_kl: Float[Tensor, "tokens"] | None,
) -> Float[Tensor, "tokens vocabulary"]:
    """`g_logp (onehot − p) + g_KL (p − p_ref)` (docs/method.md §5), overwriting `probs`."""
    run = _compiled(_logit_gradient) if _is_compiled(probs) else _logit_gradient
    gradient: Tensor = run(probs, ref_probs, labels, grad_log_probs, grad_kl)
    return gradient


def _logit_gradient(
    probs: Tensor,
    ref_probs: Tensor | None,
    labels: Tensor,
    grad_log_probs: Tensor,
    grad_kl: Tensor | None,
) -> Tensor:
    if grad_kl is None or ref_probs is None:
        probs *= -grad_log_probs[:, None]
    else:
        probs *= (grad_kl - grad_log_probs)[:, None]
        probs.addcmul_(ref_probs, grad_kl[:, None], value=-1)
    return probs.scatter_add_(1, labels[:, None], grad_log_probs[:, None])


def _is_compiled(tensor: Tensor) -> bool:
    return tensor.is_cuda


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function fused into a few kernels; another number of tokens does not recompile it."""
    return torch.compile(function, dynamic=True)
