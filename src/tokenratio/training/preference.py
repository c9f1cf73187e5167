"""Preference pairs as an objective: which batches they make, and their losses."""

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenratio.data import PairCollator, StepCollator
from tokenratio.errors import TokenRatioError
from tokenratio.models.packing import why_not_shared
from tokenratio.models.state_baseline import StateBaseline
from tokenratio.models.token_requests import language_model
from tokenratio.training.cache_entry import ReferenceCache
from tokenratio.training.config import PolicyObjective, TokenRatioConfig
from tokenratio.training.metrics import ExampleLosses
from tokenratio.training.objective import PreferenceLosses
from tokenratio.types import PairBatch, StepBatch

if TYPE_CHECKING:
    from tokenratio.training.forward import Forward

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreferenceObjective(PolicyObjective):
    """The mean over a step's pairs of the loss that `args.loss` names."""

    args: TokenRatioConfig

    @cached_property
    def _equations(self) -> PreferenceLosses:
        return PreferenceLosses(self.args)

    def metric_names(self) -> list[str]:
        # Those of a pair made up here, of two tokens each.
        rows, token = torch.ones(2, 3, dtype=torch.long), torch.zeros(4)
        mask = torch.tensor([[False, True, True]]).expand(2, 3)
        method = self.args.method
        contrast = token if method.needs_contrast else None
        pairs = PairBatch(rows, rows, mask, torch.arange(1), contrast=contrast)
        answer = {"log_probs": token, "hidden": token[:, None]}
        if method.has_reference:
            answer["ref_log_probs"] = token
            if not self.args.keeps_log_probs:
                answer["kl_ref_policy"] = token
        baseline = StateBaseline(1, 1) if method.needs_baseline else None
        return self._equations.of_pairs(pairs, answer, baseline, 1.0).metrics.names

    def collators(
        self, pad_token_id: int, models: list[Any], cache: ReferenceCache | None = None
    ) -> tuple[Any, Any]:
        """The collators for training and for evaluation, which covers whole responses."""
        whole = PairCollator(pad_token_id)
        if not self.args.compares_steps:
            return whole, whole
        steps = StepCollator(pad_token_id, cache=cache)
        if self.args.share_prompt == "never":
            return steps, whole
        reason = next(filter(None, map(why_not_shared, models)), None)
        if reason is None:
            head = language_model(models[0]).get_output_embeddings()
            hidden_size = head.weight.shape[1]
            share: Any = self.args.share_prompt
            return replace(steps, share_prompt=share, hidden_size=hidden_size), whole
        if self.args.share_prompt == "always":
            raise TokenRatioError(f"share_prompt: always, but {reason}")
        _log.warning("a pair's prompt is computed twice, once for each response: %s", reason)
        return steps, whole

    def losses(
        self, forward: "Forward", model: nn.Module, inputs: dict[str, Tensor], share: float | Tensor
    ) -> ExampleLosses:
        """The loss of each pair of a batch."""
        equations, baseline = self._equations, forward.baseline
        needs_kl = equations.method.needs_kl
        if "lengths" in inputs:
            steps = StepBatch(**inputs)
            objective = equations.for_steps(steps, baseline, share, forward.policy.dtype)
            answer = forward.ask(model, steps, with_kl=needs_kl, objective=objective)
            return equations.of_steps(steps, answer)
        pairs = PairBatch(**inputs)
        # Evaluation reports the KL for methods without it in their loss too: it measures drift.
        with_kl = needs_kl or not model.training
        # Log-probabilities may be all that was kept of the reference.
        with_kl &= forward.reference is not None and pairs.ref_log_probs is None
        answer = forward.ask(model, pairs, with_kl=with_kl)
        return equations.of_pairs(pairs, answer, baseline, share)
