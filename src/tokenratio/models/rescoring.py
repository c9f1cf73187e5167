"""Responses, whoever wrote them, run through a model again: their states, a batch at a time."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenratio.data import CompletionCollator
from tokenratio.errors import TokenRatioError
from tokenratio.models.packing import model_inputs
from tokenratio.models.token_requests import TokenRequest, language_model, own_head
from tokenratio.statistics.head import Head
from tokenratio.types import CompletionBatch


class TokenRow(NamedTuple):
    """A prompt and a response to it as token ids, special tokens included."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def head_of(model: nn.Module) -> Head:
    """The output head of a causal language model, soft-cap included."""
    base = language_model(model)
    weights = own_head(base)
    softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    return Head(weights.weight, weights.bias, softcap)


def hidden_states(model: nn.Module, batch: CompletionBatch) -> Float[Tensor, "tokens hidden"]:
    """The final state that predicts each token of the batch's responses.

    The model has been taught `token_request` (`training.models.check_model`).
    """
    inputs = model_inputs(batch, language_model(model))
    return model(**inputs, token_request=TokenRequest(batch.states))["hidden"]


def response_batches(
    rows: Sequence[TokenRow], batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], CompletionBatch]]:
    """Batches of rows of like length, and the index of each of their rows.

    Raises:
        TokenRatioError: no rows, or a row with an empty prompt; names its index, from 0.
    """
    if not rows:
        raise TokenRatioError("no samples to score")
    if empty := [index for index, row in enumerate(rows) if not len(row.prompt_ids)]:
        raise TokenRatioError(
            f"sample {empty[0]} has no prompt ids: its first token has no state; put the "
            "tokenizer's BOS there"
        )
    lengths = [len(row.prompt_ids) + len(row.response_ids) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    collate = CompletionCollator(pad_token_id=0)  # padding is masked, so any id does
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        encoded = [
            {"row": i, "prompt_ids": rows[i].prompt_ids, "completion_ids": rows[i].response_ids}
            for i in indices
        ]
        tensors = {name: tensor.to(device) for name, tensor in collate(encoded).items()}
        yield indices, CompletionBatch(**tensors)
