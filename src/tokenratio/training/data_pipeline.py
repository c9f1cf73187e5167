"""How a run's data becomes batches: encoded, in which order, with which collator."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, DatasetDict, List, Value
from peft import PeftModel
from torch import nn
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
from tokenratio.models.loading import check_fits
from tokenratio.models.packing import why_not_shared
from tokenratio.models.reference import Reference
from tokenratio.models.token_requests import language_model
from tokenratio.training.cache_entry import ReferenceCache, What
from tokenratio.training.config import TokenRatioConfig
from tokenratio.training.data_settings import Role, first_process_prepares
from tokenratio.training.reference_cache import reference_cache
from tokenratio.training.token_contrast import TokenContrast, has_contrast

_log = logging.getLogger(__name__)


Prepared = PreparedData | dict[str, PreparedData | None] | None


def prepare(
    source: Any,
    *,
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    args: TokenRatioConfig,
    model: nn.Module,
) -> PreparedData | None:
    """Encode a source that is not encoded yet, and check that the model can take it."""
    if source is None:
        return None
    if isinstance(source, PreparedData):
        # What another run's reference said of these rows is not what this one's says, and rows of a
        # selection are counted anew: errors and caches find them by their number.
        dataset = source.dataset
        stale = [name for name in dataset.column_names if name.endswith("_ref_log_probs")]
        dataset = dataset.remove_columns([*stale, "row"]).add_column("row", range(len(dataset)))
        return with_contrast(replace(source, dataset=dataset), args)
    data = encode_source(source, tokenizer, args, role=role)
    check_fits(model, data)
    return with_contrast(data, args)


def encode_source(
    source: Any, tokenizer: PreTrainedTokenizerBase, args: TokenRatioConfig, *, role: Role
) -> PreparedData:
    """The rows of a source that a run with these settings uses, as training and dry runs see them.

    Raises:
        TokenRatioError: see `prepare_pairs`.
    """
    encode = prepare_completions if args.loss == "sft" else prepare_pairs
    with first_process_prepares(args):
        return encode(source, tokenizer, **args.data_arguments(role))


def with_contrast(data: PreparedData, args: TokenRatioConfig) -> PreparedData:
    """The rows with the contrast of their tokens, if the loss needs it.

    That of `token_scores`; rows that carry theirs already may do without.

    Raises:
        TokenRatioError: there is none for them.
    """
    if "contrast" not in args.method.needs:
        return data
    if args.token_scores is None:
        if has_contrast(data.dataset):
            return data
        raise TokenRatioError(
            f"{args.loss} needs to know the contrast of every token: compute it with `tokenratio "
            "score-tokens` and name the folder in token_scores (or give a recipe a section "
            "score_tokens)"
        )
    return TokenContrast.open(args.token_scores).attach(data)


def require_signals(rows: Dataset, args: TokenRatioConfig) -> None:
    """Refuse encoded rows that lack what preparing them would have added.

    Raises:
        TokenRatioError: says what.
    """
    lacks = None
    if args.keeps_log_probs:  # those that rows may carry can be another reference's
        lacks = "what the reference says of them, which cache_reference asks"
    elif "contrast" in args.method.needs and not has_contrast(rows):
        lacks = "the contrast of their tokens, which is looked up"
    if lacks is not None:
        raise TokenRatioError(
            f"these rows lack {lacks} when rows are prepared: evaluate on the source itself, or on "
            "what prepare_pairs returned"
        )


def prepare_parts(
    source: Any, prepare: Callable[..., PreparedData | None], role: Role = "eval"
) -> Prepared:
    """Likewise what evaluation is given: a source, or a dict of several by name."""
    if is_several(source):
        return {name: prepare(part, role=role) for name, part in source.items()}
    return prepare(source, role=role)


def is_several(source: Any) -> bool:
    """Whether what evaluation is given holds several sources by name."""
    return isinstance(source, dict) and not isinstance(source, DatasetDict) and "path" not in source


def ask_reference(
    data: PreparedData,
    what: What,
    model: PreTrainedModel | PeftModel,
    args: TokenRatioConfig,
    padding_id: int,
) -> ReferenceCache:
    """What the reference says of the data, from disk or computed now.

    Args:
        model: the reference, or the policy with the adapter that is switched off for it.
    """
    return reference_cache(
        model,
        data,
        what=what,
        root=args.reference_cache_dir,
        batch_size=args.per_device_eval_batch_size,
        device=args.device,
        padding_id=padding_id,
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        progress=not args.disable_tqdm,
    )


def asking_reference(
    encode: Callable[..., PreparedData | None],
    reference: Reference,
    policy: nn.Module,
    args: TokenRatioConfig,
    padding_id: int,
) -> Callable[..., PreparedData | None]:
    """`encode`, which also gives every row the reference's log-probabilities."""

    def encode_and_ask(source: Any, *, role: Role) -> PreparedData | None:
        data = encode(source, role=role)
        if data is None:
            return None
        cache = ask_reference(data, "log_probs", reference.model or policy, args, padding_id)
        reference.leave_device()
        return with_ref_log_probs(data, cache)

    return encode_and_ask


def with_ref_log_probs(data: PreparedData, cache: ReferenceCache) -> PreparedData:
    """The rows with two more columns, `chosen_ref_log_probs` and `rejected_ref_log_probs`."""
    dataset, known = data.dataset, [cache.log_probs(row) for row in range(len(data.dataset))]
    feature = List(Value("float32"))
    for side, name in enumerate(("chosen", "rejected")):
        values = [pair[side].numpy() for pair in known]
        dataset = dataset.add_column(f"{name}_ref_log_probs", values, feature=feature)
    return replace(data, dataset=dataset)


def datasets_of(data: Prepared) -> Dataset | dict[str, Dataset] | None:
    """The rows that a data loader reads."""
    if isinstance(data, dict):
        return {name: part.dataset for name, part in data.items() if part is not None}
    return data and data.dataset


def make_collators(
    args: TokenRatioConfig,
    pad_token_id: int,
    models: list[PreTrainedModel | PeftModel],
    cache: ReferenceCache | None = None,
) -> tuple[Any, Any]:
    """The collators for training and for evaluation, which looks at whole responses.

    Args:
        models: all that will run the batches.
        cache: the reference's hidden states of the training rows, if they are kept.
    Raises:
        TokenRatioError: the prompt is to be shared always and cannot be.
    """
    if args.loss == "sft":
        collator = CompletionCollator(pad_token_id)
        return collator, collator
    whole = PairCollator(pad_token_id)
    if not args.compares_steps:
        return whole, whole
    steps = StepCollator(pad_token_id, cache=cache)
    if args.share_prompt == "never":
        return steps, whole
    reason = next(filter(None, map(why_not_shared, models)), None)
    if reason is None:
        hidden_size = language_model(models[0]).get_output_embeddings().weight.shape[1]
        return replace(steps, share_prompt=args.share_prompt, hidden_size=hidden_size), whole
    if args.share_prompt == "always":
        raise TokenRatioError(f"share_prompt: always, but {reason}")
    _log.warning("the prompt of a pair is computed once for each response: %s", reason)
    return steps, whole


def make_sampler(
    args: TokenRatioConfig, dataset: Dataset, collator: Any, num_processes: int
) -> LengthGroupedSampler:
    """Batches of rows of like length, in an order that `data_seed` (or `seed`) and epoch fix."""
    shared = isinstance(collator, StepCollator) and collator.share_prompt != "never"
    return LengthGroupedSampler(
        row_lengths(dataset, pruned=args.compares_steps, shared=shared),
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
