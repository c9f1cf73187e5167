"""The output head: its tensors, and the products that turn hidden states into logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Instructions that multiply bfloat16: of x86 (AVX-512, AMX), and of ARM.
_BFLOAT16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True)
class Head:
    """`softcap(hidden @ weightᵀ + bias)`, with `softcap(z) = c·tanh(z/c)` (docs/method.md §5)."""

    weight: Float[Tensor, "vocabulary hidden"]
    bias: Float[Tensor, "vocabulary"] | None = None
    softcap: float | None = None

    def check_fits(
        self, hidden: Tensor, labels: Tensor, hidden_name: str, weight_name: str
    ) -> None:
        """Raise `ValueError` unless the shapes of head, states and labels go together."""
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

    def detach(self) -> "Head":
        """The same head as a constant."""
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.weight.detach(), bias, self.softcap)

    def to(self, dtype: torch.dtype) -> "Head":
        """The same head in another dtype; no copy where it already has it."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.softcap)

    def is_same(self, other: "Head") -> bool:
        """Whether both are the same tensors in memory, not copies."""

        def same(left: Tensor | None, right: Tensor | None) -> bool:
            return right is left if left is None or right is None else left.is_set_to(right)

        are_same = same(self.weight, other.weight) and same(self.bias, other.bias)
        return are_same and self.softcap == other.softcap

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocabulary"]:
        """The logits, differentiably, in the dtype that states and head must share."""
        logits = hidden @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def write_logits(
        self, hidden: Float[Tensor, "tokens hidden"], out: Float[Tensor, "most vocabulary"]
    ) -> Float[Tensor, "tokens vocabulary"]:
        """Write the logits to the first rows of `out`: fresh memory per chunk costs page faults."""
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
    """The dtype of the factors of a product whose result is wanted in `dtype`.

    CUDA multiplies bfloat16 at full rate and accumulates in float32: the factors are bfloat16 where
    the weights are, or where autocast asks for it. Results never are.
    """
    if weight.is_cuda:
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        if torch.bfloat16 in (weight.dtype, autocast):
            return torch.bfloat16
    return dtype


def rounded_dtype(dtype: torch.dtype, weight: Tensor) -> torch.dtype:
    """The dtype of the factors where the result may be rounded as autocast rounds.

    Gradients may, and the difference of two models' logits. A CPU that multiplies bfloat16 in
    hardware takes half the time for it, but rounds the result; CUDA does not (`product_dtype`).
    """
    asked = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    if weight.is_cpu and dtype == torch.float32 and asked == torch.bfloat16:
        return torch.bfloat16 if multiplies_bfloat16(weight.device) else dtype
    return product_dtype(dtype, weight)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, and so faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    # Older versions of torch cannot be asked.
    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has.get(name) for name in _BFLOAT16_PRODUCTS)


def product(
    left: Float[Tensor, "m k"],
    right: Float[Tensor, "k n"],
    *,
    out: Float[Tensor, "m n"] | None = None,
) -> Float[Tensor, "m n"]:
    """The matrix product; on CUDA never rounded below float32 (docs/method.md §5, numerics)."""
    if left.dtype == torch.bfloat16 and left.is_cuda:
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
    """The value of each token's label."""
    return log_probs.gather(-1, labels[:, None]).squeeze(-1)
