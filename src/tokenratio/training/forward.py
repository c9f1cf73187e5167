"""Runs a batch through reference and policy, and returns the losses of its examples."""

from dataclasses import dataclass
from functools import cached_property

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenratio.models.packing import model_inputs
from tokenratio.models.reference import Reference, check_start
from tokenratio.models.state_baseline import StateBaseline
from tokenratio.models.token_requests import StepObjective, TokenRequest, own_head
from tokenratio.training.config import PolicyObjective, TokenRatioConfig
from tokenratio.training.metrics import ExampleLosses
from tokenratio.types import CompletionBatch, StepBatch


@dataclass
class Forward:
    """The models and the objective of a run, applied to its batches.

    Attributes:
        args: the settings.
        policy: the causal language model inside all wrappers.
        reference: π_ref; None for a loss without one.
        adapters: the PEFT model around the policy, if there is one.
        baseline: the state baseline of a method that has one.
        checks_start: the next training batch is the first: policy and reference must be one model.
    """

    args: TokenRatioConfig
    policy: PreTrainedModel
    reference: Reference | None
    adapters: PeftModel | None
    baseline: StateBaseline | None = None
    checks_start: bool = False

    @cached_property
    def objective(self) -> PolicyObjective:
        """The run's objective, with its settings resolved once."""
        return self.args.objective

    def __call__(
        self, model: nn.Module, inputs: dict[str, Tensor], share: float | Tensor
    ) -> ExampleLosses:
        """The losses of a batch from any of the collators.

        Args:
            model: the policy with all wrappers of training; it is run only through their forward.
            share: the weight of an example in the step's loss: of a pair, or for SFT of a token.
        Raises:
            TokenRatioError: policy and reference differ before the first update.
        """
        return self.objective.losses(self, model, inputs, share)

    @property
    def _computes_in(self) -> torch.dtype:
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16
        return own_head(self.policy).weight.dtype

    def ask(
        self,
        model: nn.Module,
        batch: CompletionBatch | StepBatch,
        *,
        with_kl: bool = False,
        objective: StepObjective | None = None,
    ) -> dict[str, Tensor]:
        """The policy's results for a `TokenRequest` on the batch, with the reference's states.

        The first update is refused if policy and reference differ before it.
        """
        known: Tensor | None = getattr(batch, "ref_log_probs", None)
        cached: Tensor | None = getattr(batch, "ref_hidden", None)
        ref_hidden, ref_head = None, None
        if self.reference is not None and known is None:
            ref_head, ref_hidden = self.reference.head, cached
            if ref_hidden is None:
                ref_hidden = self.reference.hidden(batch, model, self.adapters)
        request = TokenRequest(
            batch.states, batch.labels, ref_hidden, ref_head, known, with_kl, objective
        )
        inputs = model_inputs(batch, self.policy)
        answer: dict[str, Tensor] = model(**inputs, token_request=request)
        if self.checks_start and self.reference is not None and model.training:
            self.checks_start = False
            log_ratio = answer["log_probs"] - answer["ref_log_probs"]
            is_cached = known is not None or cached is not None
            check_start(log_ratio, self._computes_in, is_cached=is_cached)
        return answer
