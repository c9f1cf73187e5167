"""A token MDP small enough to enumerate: every prefix is a row of a table (docs/method.md §1)."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenratio.types import CompletionBatch


@dataclass(frozen=True)
class Policy:
    """A tabular policy, with its state baseline b(s) for methods that learn one."""

    logits: Float[Tensor, "states vocabulary"]
    baseline: Float[Tensor, "states"] | None = None

    @property
    def log_probs(self) -> Float[Tensor, "states vocabulary"]:
        return self.logits.log_softmax(-1)

    @property
    def tables(self) -> list[Tensor]:
        return [self.logits] if self.baseline is None else [self.logits, self.baseline]

    def leaf(self) -> "Policy":
        """A copy whose tables are leaves that accumulate gradients."""
        return Policy(*(table.detach().clone().requires_grad_() for table in self.tables))


@dataclass(frozen=True)
class TokenMdp:
    """One prompt, a tabular softmax reference policy and token rewards, in float64.

    States are the prefixes shorter than `horizon`, numbered like a heap: the empty one is 0, and
    token z leads from s to `V·s + z + 1`. The states of one depth are consecutive, and so are the
    children of consecutive states.

    Attributes:
        ref_logits: logits of π_ref(.|s).
        rewards: r(s, z), the reward for choosing z in s.
        horizon: the longest response.
        eos: the token that ends a response early; if None, all responses have `horizon` tokens.
    """

    ref_logits: Float[Tensor, "states vocabulary"]
    rewards: Float[Tensor, "states vocabulary"]
    horizon: int
    eos: int | None = None

    @classmethod
    def random(
        cls,
        vocabulary: int,
        horizon: int,
        *,
        seed: int,
        eos: int | None = None,
        reward_scale: float = 1.0,
    ) -> "TokenMdp":
        """Standard normal reference logits, normal rewards of that scale."""
        rng = torch.Generator().manual_seed(seed)
        shape = (sum(vocabulary**depth for depth in range(horizon)), vocabulary)
        ref_logits, rewards = (
            torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2)
        )
        return cls(ref_logits, reward_scale * rewards, horizon, eos)

    @cached_property
    def ref_log_probs(self) -> Float[Tensor, "states vocabulary"]:
        return self.ref_logits.log_softmax(-1)

    @cached_property
    def q_ref(self) -> Float[Tensor, "states vocabulary"]:
        """Q_ref(s, z) = r(s, z) + V_ref(s'), V_ref(s) = E_{z~π_ref} Q_ref(s, z).

        The reference's own values, not soft-optimal ones; V_ref = 0 once the response has ended.
        """
        q, following = self.rewards.clone(), None
        for rows in reversed(self._depths):
            if following is not None:
                q[rows] += following.view_as(q[rows]).masked_fill(self._ends, 0.0)
            following = (self.ref_log_probs[rows].exp() * q[rows]).sum(-1)
        return q

    @cached_property
    def a_ref(self) -> Float[Tensor, "states vocabulary"]:
        """A_ref(s, z) = Q_ref(s, z) − V_ref(s)."""
        return self.q_ref - (self.ref_log_probs.exp() * self.q_ref).sum(-1, keepdim=True)

    def optimum(self, beta: float) -> Policy:
        """π*(z|s) = π_ref(z|s) exp(Q_ref(s,z)/β) / Z(s), with log Z(s) as baseline."""
        unnormalised = self.ref_log_probs + self.q_ref / beta
        log_z = unnormalised.logsumexp(-1)
        return Policy(unnormalised - log_z[:, None], log_z)

    def kl(self, policy: Policy, other: Policy) -> float:
        """KL(policy ‖ other) between their distributions over responses, in nats."""
        log_ratio = policy.log_probs - other.log_probs
        reach, total = log_ratio.new_ones(1), 0.0
        for rows in self._depths:
            probs = policy.log_probs[rows].exp()
            total += float((reach[:, None] * probs * log_ratio[rows]).sum())
            reach = (reach[:, None] * probs).masked_fill(self._ends, 0.0).flatten()
        return total

    @cached_property
    def responses(self) -> CompletionBatch:
        """Every response once, after a prompt of one token (0)."""
        tokens = torch.cartesian_prod(*[torch.arange(self.ref_logits.shape[1])] * self.horizon)
        tokens = tokens.view(-1, self.horizon)
        is_eos = self._ends[tokens]
        ended = is_eos.cumsum(1) > is_eos.long()
        # A response that ended is padded in all possible ways: keep the padding of EOS alone.
        once = (~ended | is_eos).all(1)
        prompt = tokens.new_zeros(int(once.sum()), 1)
        completion_mask = torch.cat([prompt.bool(), ~ended[once]], 1)
        return CompletionBatch(
            input_ids=torch.cat([prompt, tokens[once]], 1),
            attention_mask=(completion_mask | ~prompt.bool()).long(),
            completion_mask=completion_mask,
            row=torch.arange(len(prompt)),
        )

    @cached_property
    def states(self) -> Int[Tensor, "tokens"]:
        """The state in which each of `responses.labels` was chosen."""
        states = torch.zeros_like(self.responses.input_ids)
        for step in range(self.horizon):
            token = self.responses.input_ids[:, step + 1]
            states[:, step + 1] = self.ref_logits.shape[1] * states[:, step] + token + 1
        return states[self.responses.states]

    @property
    def _depths(self) -> list[slice]:
        """The states of depth 0, 1, …, horizon − 1."""
        starts = [0]
        for _ in range(self.horizon):
            starts.append(self.ref_logits.shape[1] * starts[-1] + 1)
        return [slice(start, end) for start, end in pairwise(starts)]

    @property
    def _ends(self) -> Tensor:
        """[vocabulary], True for the EOS token."""
        return torch.arange(self.ref_logits.shape[1]) == (-1 if self.eos is None else self.eos)
