"""The matrix products of a pass over the tokens, chunk by chunk, in memory used again and again."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tokenratio.statistics.head import Head, add_product, product, product_dtype, rounded_dtype


@dataclass(frozen=True)
class Precision:
    """Dtypes of a pass; chosen in the forward pass, because backward runs outside autocast.

    Attributes:
        result: of logits, statistics and sums of gradients.
        factors: of the factors of logits and of the head's gradient.
        rounded: of the factors, and on CPU of the result, of the states' gradient.
    """

    result: torch.dtype
    factors: torch.dtype
    rounded: torch.dtype

    @classmethod
    def of(cls, result: torch.dtype, weight: Tensor) -> "Precision":
        """What autocast and the head's weight ask for now."""
        return cls(result, product_dtype(result, weight), rounded_dtype(result, weight))


class Products:
    """Products with the heads of policy and reference.

    Where both models have one head, the reference is run too and products may be rounded, the
    policy's logits are the reference's plus the head's product with the difference of the states.
    Its rounding is relative to the difference: 0.4 % of what a log-ratio is made of, and nothing
    where the models agree. Rounded logits would be off by 0.4 % of themselves.

    Args:
        reference: None where its logits are not needed.
        rows: most tokens of a chunk.
    """

    def __init__(
        self, policy: Head, reference: Head | None, precision: Precision, rows: int
    ) -> None:
        self._precision = precision
        self._policy = policy.to(precision.factors)
        weight = policy.weight
        new = weight.new_empty
        self._logits = new(rows, len(weight), dtype=precision.result)
        self._reference, self._ref_logits, is_one_head = None, None, False
        if reference is not None:
            is_one_head = reference.is_same(policy)
            self._reference = self._policy if is_one_head else reference.to(precision.factors)
            self._ref_logits = torch.empty_like(self._logits)
        self._rounded_weight, self._rounded = self._policy.weight, None
        if precision.rounded != precision.factors:
            self._rounded_weight = weight.to(precision.rounded)
            self._rounded = new(rows, len(weight), dtype=precision.rounded)
        has_cap = policy.softcap is not None
        self._adds_difference = is_one_head and not has_cap and self._rounded is not None

    def states(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """The states as factors."""
        return hidden.to(self._precision.factors)

    def write_logits(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        ref_hidden: Float[Tensor, "tokens ref_hidden"] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The logits of both models, where the previous chunk's were."""
        states, ref_logits = self.states(hidden), None
        if self._reference is not None and self._ref_logits is not None:
            assert ref_hidden is not None
            ref_states = self.states(ref_hidden)
            ref_logits = self._reference.write_logits(ref_states, self._ref_logits)
            if self._adds_difference and self._rounded is not None:
                logits = self._logits[: len(states)]
                difference = (states - ref_states).to(self._precision.rounded)
                rounded = self._rounded[: len(states)]
                logits.copy_(product(difference, self._rounded_weight.T, out=rounded))
                return logits.add_(ref_logits), ref_logits
        return self._policy.write_logits(states, self._logits), ref_logits

    def d_hidden(
        self, d_logits: Float[Tensor, "tokens vocabulary"]
    ) -> Float[Tensor, "tokens hidden"]:
        """The gradient of the states, in the dtype of its rounding."""
        if self._rounded is not None:
            d_logits = self._rounded[: len(d_logits)].copy_(d_logits)
        return product(d_logits.to(self._precision.rounded), self._rounded_weight)

    def add_d_weight(
        self,
        total: Float[Tensor, "vocabulary hidden"],
        d_logits: Float[Tensor, "tokens vocabulary"],
        hidden: Float[Tensor, "tokens hidden"],
    ) -> None:
        """Add the gradient of the policy's head."""
        add_product(total, d_logits.T.to(self._precision.factors), self.states(hidden))
