"""Prompts and responses as token ids, run through a model: one result for each row."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenratio.data import CompletionCollator
from tokenratio.errors import TokenRatioError
from tokenratio.models.heartbeat import advance
from tokenratio.models.loading import check_model
from tokenratio.models.packing import model_inputs
from tokenratio.models.processes import current
from tokenratio.models.token_requests import TokenRequest, eval_mode, language_model
from tokenratio.types import CompletionBatch

T = TypeVar("T")


class TokenRow(NamedTuple):
    """A prompt and a response to it as token ids, special tokens included."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def score_rows(
    models: Sequence[nn.Module],
    rows: Sequence[TokenRow],
    score: Callable[[CompletionBatch], Iterable[T]],
    *,
    batch_size: int,
    longest_first: bool = False,
) -> list[T]:
    """Run `score` on batches of rows of similar length, without gradients and without dropout.

    Args:
        models: those that `score` runs; their forward then takes `token_request`.
        score: returns a result for each row of a batch, which is on the first model's device.
        batch_size: rows in one batch.
        longest_first: see `batches_by_length`.
    Returns:
        The results in the order of `rows`.
    Raises:
        TokenRatioError: no rows, a row with an empty prompt (names its index, from 0), or what
            `check_model` refuses.
    """
    if not rows:
        raise TokenRatioError("no samples to score")
    if empty := [index for index, row in enumerate(rows) if not row.prompt_ids]:
        raise TokenRatioError(
            f"sample {empty[0]} has no prompt ids: its first token has no state; start it with "
            "the tokenizer's BOS"
        )
    device = next(models[0].parameters()).device
    collate = CompletionCollator(pad_token_id=0)  # padding is masked, so any id does

    def run(indices: list[int]) -> Iterable[T]:
        encoded = [
            {"row": i, "prompt_ids": rows[i].prompt_ids, "completion_ids": rows[i].response_ids}
            for i in indices
        ]
        tensors = {name: tensor.to(device) for name, tensor in collate(encoded).items()}
        return score(CompletionBatch(**tensors))

    with torch.no_grad(), eval_mode(*models):
        for model in models:
            check_model(model)
        lengths = [row.num_tokens for row in rows]
        return run_by_length(lengths, run, batch_size=batch_size, longest_first=longest_first)


def run_by_length(
    lengths: Sequence[int],
    run: Callable[[list[int]], Iterable[T]],
    *,
    batch_size: int,
    longest_first: bool = False,
) -> list[T]:
    """Results of `run`, called with the indices of each batch, in the order of `lengths`.

    The processes of `processes.current` share the batches; each returns all results, or raises the
    refusal of any.
    """
    group, results = current(), dict[int, T]()
    refusal: TokenRatioError | None = None
    batches = list(batches_by_length(lengths, batch_size, longest_first=longest_first))
    try:
        for indices in group.share(batches):
            results.update(zip(indices, run(indices), strict=True))
            advance()
    except TokenRatioError as error:
        refusal = error
    for part, refused in group.gather((results, refusal)):
        if refused is not None:
            raise refused
        results |= part
    return [results[index] for index in range(len(lengths))]


def batches_by_length(
    lengths: Sequence[int], batch_size: int, *, longest_first: bool = False
) -> Iterator[list[int]]:
    """Indices in batches of similar length, which need little padding.

    Args:
        longest_first: a lack of memory then shows in the first batch.

    >>> list(batches_by_length([3, 9, 4], 2))
    [[0, 2], [1]]
    >>> list(batches_by_length([3, 9, 4], 2, longest_first=True))
    [[1, 2], [0]]
    """
    sign = -1 if longest_first else 1
    order = sorted(range(len(lengths)), key=lambda index: sign * lengths[index])
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


def hidden_states(model: nn.Module, batch: CompletionBatch) -> Float[Tensor, "tokens hidden"]:
    """The final state that predicts each token of the batch's responses.

    The model must take `token_request` (`models.loading.check_model`).
    """
    inputs = model_inputs(batch, language_model(model))
    hidden: Tensor = model(**inputs, token_request=TokenRequest(batch.states))["hidden"]
    return hidden
