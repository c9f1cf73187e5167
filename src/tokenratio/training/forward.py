"""One batch through reference and policy: from a collator's tensors to the examples' losses."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenratio.models.packing import model_inputs
from tokenratio.models.reference import Reference, check_start
from tokenratio.models.state_baseline import StateBaseline
from tokenratio.models.token_requests import StepRequest, TokenRequest
from tokenratio.training.config import TokenRatioConfig
from tokenratio.training.metrics import ExampleLosses
from tokenratio.types import CompletionBatch, StepBatch


@dataclass
class Forward:
    """What a run's batches go through.

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

    def __call__(
        self, model: nn.Module, inputs: dict[str, Tensor], share: float | Tensor
    ) -> ExampleLosses:
        """The losses of a batch of whichever collator.

        Args:
            model: the policy with every wrapper that training put around it: all its work is done
                inside their forward.
            share: what an example counts in the step's loss: a pair, or for SFT a token.
        Raises:
            TokenRatioError: policy and reference differ before the first update.
        """
        return self.args.objective.losses(self, model, inputs, share)

    @property
    def _computes_in(self) -> torch.dtype:
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16
        return self.policy.get_output_embeddings().weight.dtype

    def ask(
        self,
        model: nn.Module,
        batch: CompletionBatch | StepBatch,
        request: type[TokenRequest] | type[StepRequest],
        **wanted: Any,
    ) -> dict[str, Tensor]:
        """The policy's answer to a request about a batch, with the reference's beside it.

        Args:
            wanted: what else the request holds.
        Raises:
            TokenRatioError: policy and reference differ before the first update.
        """
        wanted = {"states": batch.states, "labels": batch.labels, **wanted}
        known = getattr(batch, "ref_log_probs", None)
        if self.reference is not None and known is None:
            hidden = getattr(batch, "ref_hidden", None)
            if hidden is None:
                hidden = self.reference.hidden(batch, model, self.adapters)
            wanted |= {"ref_hidden": hidden, "ref_head": self.reference.head}
        answer = model(**model_inputs(batch, self.policy), token_request=request(**wanted))
        if known is not None:
            answer["ref_log_probs"] = known.to(answer["log_probs"].dtype)
        if self.checks_start and self.reference is not None and model.training:
            self.checks_start = False
            is_cached = known is not None or getattr(batch, "ref_hidden", None) is not None
            log_ratio = answer["log_probs"] - answer["ref_log_probs"]
            check_start(log_ratio, self._computes_in, is_cached=is_cached)
        return answer
