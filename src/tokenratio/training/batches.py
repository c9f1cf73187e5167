"""How a run's data becomes batches: encoded, in which order, with which collator."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenratio.data import (
    CompletionCollator,
    LengthGroupedSampler,
    PairCollator,
    PreparedData,
    StepCollator,
    prepare_completions,
    prepare_pairs,
    row_lengths,
)
from tokenratio.errors import TokenRatioError
from tokenratio.losses import LOSSES
from tokenratio.training.config import TokenRatioConfig
from tokenratio.training.models import check_fits
from tokenratio.training.packing import why_not_shared

# Sharing pays where it leaves less than this share of the positions to compute: a whole mask makes
# attention dearer (docs/performance.md).
_SHARE_BELOW = 0.9

_log = logging.getLogger(__name__)


Prepared = PreparedData | dict[str, PreparedData | None] | None


def prepare(
    source: Any,
    *,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    args: TokenRatioConfig,
    model: nn.Module,
) -> PreparedData | None:
    """Encode a source that is not encoded yet, and check that the model can take it."""
    if source is None or isinstance(source, PreparedData):
        return source
    encode = prepare_completions if args.loss == "sft" else prepare_pairs
    data = encode(
        source,
        tokenizer,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        on_bad_row=args.on_bad_row,
        split=split,
    )
    check_fits(model, data)
    return data


def prepare_parts(source: Any, prepare: Callable[..., PreparedData | None]) -> Prepared:
    """Likewise what evaluation is given: a source, or a dict of several by name."""
    if isinstance(source, dict) and not isinstance(source, DatasetDict):
        return {name: prepare(part, split="test") for name, part in source.items()}
    return prepare(source, split="test")


def datasets_of(data: Prepared) -> Dataset | dict[str, Dataset] | None:
    """The rows that a data loader reads."""
    if isinstance(data, dict):
        return {name: part.dataset for name, part in data.items()}
    return data and data.dataset


def is_local(loss: str) -> bool:
    """Whether a loss looks at one step at a time, so that no more than its steps is computed."""
    return loss != "sft" and LOSSES[loss].per_step is not None


def make_collators(
    args: TokenRatioConfig, pad_token_id: int, models: list[PreTrainedModel]
) -> tuple[Any, Any]:
    """The collators for training and for evaluation, which looks at whole responses.

    Args:
        models: all that will run the batches.
    Raises:
        TokenRatioError: the prompt is to be shared always and cannot be.
    """
    if args.loss == "sft":
        collator = CompletionCollator(pad_token_id)
        return collator, collator
    whole = PairCollator(pad_token_id)
    if not is_local(args.loss):
        return whole, whole
    steps = StepCollator(pad_token_id)
    if args.share_prompt == "never":
        return steps, whole
    reason = next(filter(None, map(why_not_shared, models)), None)
    if reason is None:
        below = _SHARE_BELOW if args.share_prompt == "auto" else float("inf")
        return replace(steps, share_below=below), whole
    if args.share_prompt == "always":
        raise TokenRatioError(f"share_prompt: always, but {reason}")
    _log.warning("the prompt of a pair is computed once for each response: %s", reason)
    return steps, whole


def make_sampler(args: TokenRatioConfig, dataset: Any, num_processes: int) -> Sampler[int]:
    """Batches of rows of like length, in an order that `data_seed` (or `seed`) and epoch fix."""
    return LengthGroupedSampler(
        row_lengths(dataset, pruned=is_local(args.loss)),
        args.train_batch_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        num_processes=num_processes,
    )


def count_tokens(inputs: dict[str, torch.Tensor]) -> int:
    """Tokens that a model runs over in this batch; a shared prompt counts once."""
    return int(inputs["attention_mask"].sum())


def name_rows(rows: list[int], data: PreparedData | None) -> str:
    """Where rows of a batch come from: training rows by their origin, those of `None` by number."""
    names = [
        f"evaluation row {row}" if data is None else data.dataset[row]["origin"] for row in rows
    ]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more if names else "rows of another process"
