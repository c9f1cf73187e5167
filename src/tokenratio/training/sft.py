"""Supervised fine-tuning: cross-entropy on the response tokens, as an objective of its own."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tokenratio.data import CompletionCollator, PreparedData, prepare_completions
from tokenratio.losses import sft_loss
from tokenratio.training.config import PolicyObjective
from tokenratio.training.metrics import ExampleLosses, ExampleMetrics
from tokenratio.types import CompletionBatch

if TYPE_CHECKING:
    from tokenratio.training.forward import Forward


@dataclass(frozen=True)
class SftObjective(PolicyObjective):
    """The mean over a step's response tokens, as in transformers."""

    rows_per_example: ClassVar[int] = 1
    groups_by_length: ClassVar[bool] = False
    predicted: ClassVar[tuple[str, ...]] = ("logps/chosen",)

    def encode(
        self, source: Any, tokenizer: PreTrainedTokenizerBase, **settings: Any
    ) -> PreparedData:
        """The rows of a source as token ids; see `prepare_completions`."""
        return prepare_completions(source, tokenizer, **settings)

    def weight(self, inputs: dict[str, Tensor]) -> int:
        """The number of response tokens."""
        return int(inputs["completion_mask"].sum())

    def metric_names(self) -> list[str]:
        rows, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[False, True, True]])
        batch = CompletionBatch(rows, rows, mask.expand(2, 3), torch.arange(2))
        return completion_losses(batch, {"log_probs": torch.zeros(4)}, 1.0).metrics.names

    def collators(self, pad_token_id: int, models: Any, cache: Any = None) -> tuple[Any, Any]:
        """One collator, for training and for evaluation."""
        collator = CompletionCollator(pad_token_id)
        return collator, collator

    def losses(
        self, forward: "Forward", model: nn.Module, inputs: dict[str, Tensor], share: float | Tensor
    ) -> ExampleLosses:
        """The loss of each completion of a batch."""
        batch = CompletionBatch(**inputs)
        return completion_losses(batch, forward.ask(model, batch), share)


def completion_losses(
    batch: CompletionBatch, answer: dict[str, Tensor], share: float | Tensor
) -> ExampleLosses:
    """Cross-entropy on the response tokens, each weighted by `share`."""
    log_probs = batch.align(answer["log_probs"])
    tokens = batch.response_mask.sum(-1).to(log_probs.dtype)
    loss = sft_loss(log_probs, batch.response_mask)
    ratios = {
        "loss": (loss.detach(), tokens),
        "logps/chosen": (log_probs.detach().sum(-1), torch.ones_like(tokens)),
    }
    return ExampleLosses(loss.sum() * share, loss.detach(), ExampleMetrics(ratios))
