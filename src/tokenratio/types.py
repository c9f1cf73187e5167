"""Batches of token ids, and the statistics and losses of their tokens."""

from dataclasses import dataclass, fields
from functools import cached_property

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
    def states(self) -> Bool[Tensor, "rows length"]:
        """True where the hidden state predicts a response token: one position to its left."""
        return self.completion_mask.roll(-1, dims=1)

    @cached_property
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
    """A `CompletionBatch` of pairs: all chosen rows, then all rejected ones in the same order.

    Attributes:
        ref_log_probs: log π_ref of `labels` in nats, where it was computed beforehand.
        contrast: log p₊ − log p₋ of `labels` in nats, for losses that need it.
    """

    ref_log_probs: Float[Tensor, "tokens"] | None = None
    contrast: Float[Tensor, "tokens"] | None = None

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Cut `[2·pairs, ...]` into its chosen and its rejected half."""
        chosen, rejected = rows.chunk(2)
        return chosen, rejected

    def sides(self, per_token: Float[Tensor, "tokens"]) -> tuple[Tensor, Tensor]:
        """The flat values of `labels` as `[pairs, steps]`, for chosen and rejected responses."""
        return self.split(self.align(per_token))

    @property
    def pair_mask(self) -> Bool[Tensor, "pairs steps"]:
        """True while both responses have a token: t < T = min(|y^w|, |y^l|) (docs/method.md §2)."""
        chosen, rejected = self.split(self.response_mask)
        return chosen & rejected


@dataclass(frozen=True)
class StepBatch:
    """Pairs cut to the steps both responses have, for losses that compare step by step.

    Rows are either the two responses of each pair, each after its prompt, or one row per pair in
    which `prompt, chosen, rejected` share the prompt. A *step* t < T = min(|y^w|, |y^l|) compares
    two tokens; `states` and `labels` list the chosen token of every step, pair after pair, then
    the rejected token of every step in the same order (docs/method.md §5).

    Attributes:
        input_ids: token ids.
        attention_mask: 1 on tokens, 0 on padding.
        states: for each label the position that predicts it, counted over the flattened rows.
        labels: the response tokens compared.
        lengths: T of each pair.
        past: for each pair, the tokens of the longer response past T.
        row: for each pair, its index in the encoded dataset.
        branch: in rows that share the prompt, 0 on it, 1 on chosen, 2 on rejected tokens, -1 on
            padding; None in the other layout.
        position_ids: goes with `branch`: both responses count on from the prompt.
        ref_log_probs: log π_ref of each label in nats, where it was computed beforehand.
        ref_hidden: the reference's hidden state that predicts each label, if computed beforehand.
    """

    input_ids: Int[Tensor, "rows length"]
    attention_mask: Int[Tensor, "rows length"]
    states: Int[Tensor, "tokens"]
    labels: Int[Tensor, "tokens"]
    lengths: Int[Tensor, "pairs"]
    past: Int[Tensor, "pairs"]
    row: Int[Tensor, "pairs"]
    branch: Int[Tensor, "rows length"] | None = None
    position_ids: Int[Tensor, "rows length"] | None = None
    ref_log_probs: Float[Tensor, "tokens"] | None = None
    ref_hidden: Float[Tensor, "tokens hidden"] | None = None

    @cached_property
    def step_mask(self) -> Bool[Tensor, "pairs steps"]:
        """True at t < T."""
        steps = torch.arange(int(self.lengths.max()), device=self.lengths.device)
        return steps < self.lengths[:, None]

    def align(self, per_step: Float[Tensor, "steps"]) -> Float[Tensor, "pairs longest"]:
        """Put flat values, one per step, at their index in the pair; 0 past T."""
        mask = self.step_mask
        return per_step.new_zeros(mask.shape).masked_scatter(mask, per_step)

    def sides(self, per_token: Float[Tensor, "tokens"]) -> tuple[Tensor, Tensor]:
        """The flat values of `labels` as `[pairs, longest]`, for chosen and rejected tokens."""
        mask = self.step_mask.repeat(2, 1)
        chosen, rejected = per_token.new_zeros(mask.shape).masked_scatter(mask, per_token).chunk(2)
        return chosen, rejected


@dataclass(frozen=True)
class TokenStatistics:
    """Log-probabilities of each token under policy and reference, and the KL at its state; nats.

    Attributes:
        log_probs: log π(y_t | s_t).
        ref_log_probs: log π_ref(y_t | s_t); None without a reference.
        kl_ref_policy: KL(π_ref(.|s_t) ‖ π(.|s_t)) over the whole vocabulary; None unless asked for.
    """

    log_probs: Float[Tensor, "tokens"]
    ref_log_probs: Float[Tensor, "tokens"] | None = None
    kl_ref_policy: Float[Tensor, "tokens"] | None = None


@dataclass(frozen=True)
class ResponseStatistics:
    """One side of every pair, aligned on the responses' first token; in nats, 0 past their ends.

    Attributes:
        log_probs: log π(y_t | s_t).
        mask: True while the response has a token.
        ref_log_probs: log π_ref(y_t | s_t); None for a loss without a reference.
        kl: KL(π_ref(.|s_t) ‖ π(.|s_t)); None unless the loss needs it.
        contrast: log p₊(y_t) − log p₋(y_t) of two contrasting models or prompts; None unless the
            loss needs it.
    """

    log_probs: Float[Tensor, "pairs steps"]
    mask: Bool[Tensor, "pairs steps"]
    ref_log_probs: Float[Tensor, "pairs steps"] | None = None
    kl: Float[Tensor, "pairs steps"] | None = None
    contrast: Float[Tensor, "pairs steps"] | None = None

    @property
    def log_ratio(self) -> Float[Tensor, "pairs steps"]:
        """ρ_t = log π(y_t|s_t) − log π_ref(y_t|s_t)."""
        if self.ref_log_probs is None:
            raise ValueError("these statistics have no reference")
        return self.log_probs - self.ref_log_probs

    @property
    def lengths(self) -> Float[Tensor, "pairs"]:
        """Tokens of each response."""
        return self.mask.sum(-1).to(self.log_probs.dtype)


@dataclass(frozen=True)
class StepStatistics:
    """The two tokens of each step, in nats: what a loss reads that is local to its step.

    Attributes:
        chosen_log_ratio, rejected_log_ratio: ρ_t = log π(y_t|s_t) − log π_ref(y_t|s_t).
        chosen_kl, rejected_kl: KL(π_ref(.|s_t) ‖ π(.|s_t)) at each token's state, where needed.
        log_state_weight: log w_t before β, where a learned baseline gives it.
    """

    chosen_log_ratio: Float[Tensor, "*steps"]
    rejected_log_ratio: Float[Tensor, "*steps"]
    chosen_kl: Float[Tensor, "*steps"] | None = None
    rejected_kl: Float[Tensor, "*steps"] | None = None
    log_state_weight: Float[Tensor, "*steps"] | None = None

    def __getitem__(self, mask: Bool[Tensor, "*steps"]) -> "StepStatistics":
        """The steps where the mask is True, as flat arrays in row-major order."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        known = {name: value for name, value in values.items() if value is not None}
        return StepStatistics(**{name: v.masked_select(mask) for name, v in known.items()})


@dataclass(frozen=True)
class PairStatistics:
    """The two responses of each pair, as a loss reads them.

    Attributes:
        chosen: the preferred responses; `rejected` the others.
        log_state_weight: log w_t before β (docs/method.md §2) where a learned baseline gives it, at
            every step either response has; None where it comes from the KL, or there is none.
    """

    chosen: ResponseStatistics
    rejected: ResponseStatistics
    log_state_weight: Float[Tensor, "pairs steps"] | None = None

    @property
    def pair_mask(self) -> Bool[Tensor, "pairs steps"]:
        """True while both responses have a token: t < T = min(|y^w|, |y^l|) (docs/method.md §2)."""
        return self.chosen.mask & self.rejected.mask

    @property
    def steps(self) -> StepStatistics:
        """Both responses side by side; index it with `pair_mask` for the steps they share."""
        return StepStatistics(
            self.chosen.log_ratio,
            self.rejected.log_ratio,
            self.chosen.kl,
            self.rejected.kl,
            self.log_state_weight,
        )


@dataclass(frozen=True)
class StepLosses:
    """A loss that is local to its step, and what it was computed from.

    Attributes:
        total: Σ_t step_weight_t · loss_t; the only one that gradients flow through.
        per_step: loss_t.
        tokens: of the chosen token of every step, then of the rejected ones.
    """

    total: Float[Tensor, ""]
    per_step: Float[Tensor, "steps"]
    tokens: TokenStatistics
