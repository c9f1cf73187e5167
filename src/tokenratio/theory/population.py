"""The population loss of a preference method on a token MDP (docs/method.md §10)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor

from tokenratio.bregman import BregmanGenerator
from tokenratio.losses import Method
from tokenratio.ratios import baseline_state_weight
from tokenratio.statistics import token_statistics
from tokenratio.theory.mdp import Policy, TokenMdp
from tokenratio.types import PairStatistics, ResponseStatistics


class Population:
    """All ordered pairs of independent responses of the reference, with every possible labelling.

    A labelling swaps the roles of the two responses at some of the steps. One list of swaps, with
    their probabilities given the pair, covers both schemes of docs/method.md §10:

    - `"a"`: at every step t an independent label, P(first ≻ second) = σ(S_t − S'_t), with the score
      S = A_ref or Q_ref. The prefixes of the two tokens are exchangeable. For token-level methods.
    - `"c"`: one label for the pair from the sums of rewards, σ(Σr − Σr'), as in real data.

    The tables go through the functions that train language models: the "hidden state" of a prefix
    is a one-hot row, the "head" is the table of logits.

    Args:
        beta: β of docs/method.md §2; the labels do not depend on it.
        labels: the scheme.
        score: what scheme `"a"` compares: `"advantage"` for TBPO-A, `"value"` for TBPO-Q.
        center_baseline, baseline_clamp: as in the released TBPO-Q (docs/method.md §4).
    """

    def __init__(
        self,
        mdp: TokenMdp,
        *,
        beta: float,
        labels: Literal["a", "c"] = "a",
        score: Literal["advantage", "value"] = "advantage",
        center_baseline: bool = False,
        baseline_clamp: float = 10.0,
    ) -> None:
        self.mdp, self.beta = mdp, beta
        self.center_baseline, self.baseline_clamp = center_baseline, baseline_clamp
        batch, states = mdp.responses, mdp.states
        self.mask = batch.response_mask
        index = torch.arange(len(self.mask))
        self.first, self.second = index.repeat_interleave(len(index)), index.repeat(len(index))
        log_probs = batch.align(mdp.ref_log_probs[states, batch.labels]).sum(1)
        of_pair = (log_probs[self.first] + log_probs[self.second]).exp()

        if labels == "a":
            table = mdp.a_ref if score == "advantage" else mdp.q_ref
            scores = batch.align(table[states, batch.labels])
            both = self.mask[self.first] & self.mask[self.second]
            margin = (scores[self.first] - scores[self.second]) * both
            swaps = torch.cartesian_prod(*[torch.tensor([False, True])] * mdp.horizon)
            self.swaps = swaps.view(-1, mdp.horizon)
            signs = 1 - 2 * self.swaps.to(margin.dtype)
            of_labels = (signs * margin[:, None]).sigmoid().prod(-1)
        elif labels == "c":
            total = batch.align(mdp.rewards[states, batch.labels]).sum(1)
            margin = total[self.first] - total[self.second]
            self.swaps = torch.tensor([[False], [True]]).expand(-1, mdp.horizon)
            of_labels = torch.stack([margin, -margin], 1).sigmoid()
        else:
            raise ValueError(f"labels must be 'a' or 'c', not {labels!r}")
        self.probability = (of_pair[:, None] * of_labels).flatten()

    def roles(self, per_step: Shaped[Tensor, "responses steps"]) -> tuple[Tensor, Tensor]:
        """The values of the chosen and of the rejected side, `[labelled, steps]`."""
        first, second = per_step[self.first, None], per_step[self.second, None]
        chosen = torch.where(self.swaps, second, first)
        rejected = torch.where(self.swaps, first, second)
        return chosen.flatten(0, 1), rejected.flatten(0, 1)

    def statistics(self, policy: Policy, method: Method) -> PairStatistics:
        """The statistics that the method needs, for every labelled pair."""
        batch, states = self.mdp.responses, self.mdp.states
        hidden = F.one_hot(states, len(self.mdp.rewards)).to(self.mdp.rewards.dtype)
        of_tokens = token_statistics(
            hidden,
            policy.logits.T,
            batch.labels,
            hidden,
            self.mdp.ref_logits.T,
            with_kl=method.needs_kl,
        )
        kl = of_tokens.kl_ref_policy
        assert of_tokens.ref_log_probs is not None
        chosen, rejected = (
            ResponseStatistics(*side)
            for side in zip(
                self.roles(batch.align(of_tokens.log_probs)),
                self.roles(self.mask),
                self.roles(batch.align(of_tokens.ref_log_probs)),
                (None, None) if kl is None else self.roles(batch.align(kl)),
                strict=True,
            )
        )
        if not method.needs_baseline:
            return PairStatistics(chosen, rejected)
        assert policy.baseline is not None, "the method needs a policy with a baseline"
        weight = baseline_state_weight(
            *self.roles(batch.align(policy.baseline[states])),
            chosen.mask & rejected.mask,
            center=self.center_baseline,
            clamp=self.baseline_clamp,
        )
        return PairStatistics(chosen, rejected, weight)

    def loss(self, policy: Policy, method: Method, generator: BregmanGenerator) -> Tensor:
        """The expected loss of a random labelled pair, as a sum over all of them."""
        pairs = self.statistics(policy, method)
        return self.probability @ method.per_pair(pairs, beta=self.beta, generator=generator)

    def gradient(self, policy: Policy, method: Method, generator: BregmanGenerator) -> Tensor:
        """The gradient in all entries of the policy's tables, flat; 0 for unused ones."""
        policy = policy.leaf()
        loss = self.loss(policy, method, generator)
        gradients = torch.autograd.grad(loss, policy.tables, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def fit(
        self, method: Method, generator: BregmanGenerator, *, max_iterations: int = 1000
    ) -> Policy:
        """Minimise the population loss from the reference (and b = 0), by L-BFGS to rounding."""
        baseline = self.mdp.ref_logits.new_zeros(len(self.mdp.ref_logits))
        learned = baseline if method.needs_baseline else None
        policy = Policy(self.mdp.ref_logits, learned).leaf()
        optimizer = torch.optim.LBFGS(
            policy.tables,
            max_iter=max_iterations,
            history_size=50,
            tolerance_grad=1e-12,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            optimizer.zero_grad()
            loss = self.loss(policy, method, generator)
            loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return Policy(*(table.detach() for table in policy.tables))
