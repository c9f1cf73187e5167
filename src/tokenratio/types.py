"""What passes between the rooms: batches of token ids, and what a model says of each token."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class CompletionBatch:
    """Rows of `prompt + response + padding`, padded on the right.

    Attributes:
        input_ids: token ids.
        attention_mask: 1 on prompt and response, 0 on padding.
        completion_mask: True on the tokens of the response (EOS included), False elsewhere.
        row: for each example, its index in the encoded dataset, so that an error can name it.
    """

    input_ids: Int[Tensor, "rows length"]
    attention_mask: Int[Tensor, "rows length"]
    completion_mask: Bool[Tensor, "rows length"]
    row: Int[Tensor, "examples"]

    @property
    def labels(self) -> Int[Tensor, "tokens"]:
        """The response tokens of all rows, one after the other (row-major)."""
        return self.input_ids[self.completion_mask]

    @property
    def state_mask(self) -> Bool[Tensor, "rows length"]:
        """True where the hidden state predicts a response token: one position to its left."""
        return self.completion_mask.roll(-1, dims=1)

    @property
    def response_mask(self) -> Bool[Tensor, "rows steps"]:
        """Responses aligned on their first token: True at t while the row still has a token."""
        lengths = self.completion_mask.sum(1)
        steps = torch.arange(int(lengths.max()), device=lengths.device)
        return steps < lengths[:, None]

    def align(self, per_token: Float[Tensor, "tokens"]) -> Float[Tensor, "rows steps"]:
        """Put the flat values of `labels` at their index in the response; 0 past its end."""
        mask = self.response_mask
        return per_token.new_zeros(mask.shape).masked_scatter(mask, per_token)


@dataclass(frozen=True)
class PairBatch(CompletionBatch):
    """A `CompletionBatch` of pairs: all chosen rows, then all rejected ones in the same order."""

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Cut `[2·pairs, ...]` into its chosen and its rejected half."""
        chosen, rejected = rows.chunk(2)
        return chosen, rejected

    @property
    def pair_mask(self) -> Bool[Tensor, "pairs steps"]:
        """True while both responses have a token: t < T = min(|y^w|, |y^l|) (METHOD §2)."""
        chosen, rejected = self.split(self.response_mask)
        return chosen & rejected


@dataclass(frozen=True)
class TokenStatistics:
    """What policy and reference say of each token, in nats.

    Attributes:
        log_probs: log π(y_t | s_t).
        ref_log_probs: log π_ref(y_t | s_t); None without a reference.
        kl_ref_policy: KL(π_ref(.|s_t) ‖ π(.|s_t)) over the whole vocabulary; None unless asked for.
    """

    log_probs: Float[Tensor, "tokens"]
    ref_log_probs: Float[Tensor, "tokens"] | None = None
    kl_ref_policy: Float[Tensor, "tokens"] | None = None


@dataclass(frozen=True)
class PairStatistics:
    """The two responses of each pair, aligned on their first token: what a loss reads.

    Attributes:
        chosen_log_ratio: ρ_t = log π(y_t|s_t) − log π_ref(y_t|s_t) in nats, 0 past the response's
            end; `rejected_log_ratio` likewise.
        log_state_weight: log w_t before β (METHOD §2); zeros where a method has none.
        chosen_mask: True while the chosen response has a token; `rejected_mask` likewise.
    """

    chosen_log_ratio: Float[Tensor, "pairs steps"]
    rejected_log_ratio: Float[Tensor, "pairs steps"]
    log_state_weight: Float[Tensor, "pairs steps"]
    chosen_mask: Bool[Tensor, "pairs steps"]
    rejected_mask: Bool[Tensor, "pairs steps"]

    @property
    def pair_mask(self) -> Bool[Tensor, "pairs steps"]:
        """True while both responses have a token: t < T = min(|y^w|, |y^l|) (METHOD §2)."""
        return self.chosen_mask & self.rejected_mask
