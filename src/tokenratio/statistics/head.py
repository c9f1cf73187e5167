"""The output head as arithmetic: hidden states to logits, and the terms of the KL."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """`softcap(hidden @ weightᵀ + bias)`, with `softcap(z) = c·tanh(z/c)` (docs/method.md §5)."""

    weight: Float[Tensor, "vocabulary hidden"]
    bias: Float[Tensor, "vocabulary"] | None
    softcap: float | None

    def check_fits(
        self, hidden: Tensor, labels: Tensor, hidden_name: str, weight_name: str
    ) -> None:
        if hidden.ndim != 2 or labels.ndim != 1 or len(hidden) != len(labels):
            raise ValueError(
                f"{hidden_name} must be [tokens, hidden] and labels [tokens], "
                f"not {list(hidden.shape)} and {list(labels.shape)}"
            )
        if self.weight.ndim != 2 or self.weight.shape[1] != hidden.shape[1]:
            raise ValueError(
                f"{weight_name} must be [vocabulary, {hidden.shape[1]}], "
                f"not {list(self.weight.shape)}"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"the bias that goes with {weight_name} must be [{len(self.weight)}], "
                f"not {list(self.bias.shape)}"
            )

    def to(self, dtype: torch.dtype) -> "Head":
        """The same head in another dtype; no copy where it already has it."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.softcap)

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocabulary"]:
        """Differentiable; the factors must have the dtype that the logits are to have."""
        logits = hidden @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def write_logits(
        self, hidden: Float[Tensor, "tokens hidden"], out: Float[Tensor, "most vocabulary"]
    ) -> Float[Tensor, "tokens vocabulary"]:
        """The logits in the first rows of `out`: fresh memory for each chunk costs page faults."""
        logits = product(hidden, self.weight.T, out=out[: len(hidden)])
        if self.bias is not None:
            logits += self.bias
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or wider where one of the tensors is."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def product_dtype(dtype: torch.dtype, weight: Tensor) -> torch.dtype:
    """What the factors of the head's products are cast to, whose results are wanted in `dtype`.

    CUDA multiplies bfloat16 at full rate and adds up in float32: where that is the weights' dtype,
    or autocast asks for it, factors are bfloat16. Results never are.
    """
    if weight.is_cuda:
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        if torch.bfloat16 in (weight.dtype, autocast):
            return torch.bfloat16
    return dtype


def product(
    left: Float[Tensor, "m k"],
    right: Float[Tensor, "k n"],
    *,
    out: Float[Tensor, "m n"] | None = None,
) -> Float[Tensor, "m n"]:
    """The matrix product, never rounded below float32 (docs/method.md §5, numerics)."""
    if left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left, right, out=out)


def add_product(total: Float[Tensor, "m n"], left: Float[Tensor, "m k"], right: Tensor) -> None:
    """`total += left @ right`, in place."""
    if left.dtype == torch.bfloat16:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left, right)


def gather_labels(
    log_probs: Float[Tensor, "tokens vocabulary"], labels: Int[Tensor, "tokens"]
) -> Float[Tensor, "tokens"]:
    return log_probs.gather(-1, labels[:, None]).squeeze(-1)


def kl_terms(
    log_probs: Float[Tensor, "tokens vocabulary"], ref_log_probs: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, "tokens vocabulary"]:
    """Terms ≥ 0 that sum to KL(π_ref ‖ π): `p_ref (expm1(−d) + d)`, d = log p_ref − log p.

    The terms `p_ref d` alone cancel: 7 % error at a KL of 3e-6
    (docs/method.md §5). For d < 0 the same
    quantity is written as `p (d e^d − expm1(d))`, which cannot overflow. Each half is 0 where the
    other holds; clamping is many times faster than `where`.
    """
    difference = ref_log_probs - log_probs
    above, below = difference.clamp(min=0), difference.clamp(max=0)
    shrink = torch.expm1(below)
    return ref_log_probs.exp() * (torch.expm1(-above) + above) + log_probs.exp() * (
        below * shrink + (below - shrink)
    )
