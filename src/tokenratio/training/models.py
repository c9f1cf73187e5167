"""From names to models: loading, the adapter, and the reference that goes with it."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokenratio.data import PreparedData
from tokenratio.errors import TokenRatioError
from tokenratio.training.loading import WHERE_KWARGS, loading_arguments
from tokenratio.training.policy import (
    answer_token_requests,
    check_causal,
    check_statistics,
    language_model,
    own_head,
)
from tokenratio.training.reference import Reference


def load_model(name: str | Path, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """A causal language model by hub name or folder, in float32 unless `init_kwargs` differs.

    Raises:
        TokenRatioError: it cannot be found or loaded.
    """
    arguments = loading_arguments(init_kwargs)
    try:
        return AutoModelForCausalLM.from_pretrained(str(name), **arguments)
    except Exception as error:  # whatever is wrong with the files or the arguments
        raise TokenRatioError(f"cannot load model {str(name)!r}: {_first_line(error)}") from None


def load_tokenizer(
    model: str | Path | nn.Module, init_kwargs: dict[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model, from the revision that the model's `init_kwargs` name.

    Raises:
        TokenRatioError: there is none.
    """
    name = model if isinstance(model, str | Path) else language_model(model).config.name_or_path
    where = {k: v for k, v in (init_kwargs or {}).items() if k in WHERE_KWARGS}
    try:
        return AutoTokenizer.from_pretrained(str(name), **where)
    except Exception as error:
        raise TokenRatioError(
            f"cannot load a tokenizer for {str(name)!r}: {_first_line(error)}"
        ) from None


def generation_ends(config: Any) -> list[int] | None:
    """The ids at which a model's generation_config stops; None where it names none."""
    ends = getattr(config, "eos_token_id", None)
    return ends if ends is None or isinstance(ends, list) else [ends]


def load_generation_ends(name: str | Path) -> list[int] | None:
    """Likewise of a model by hub name or folder; None too where it has no generation_config."""
    try:
        return generation_ends(GenerationConfig.from_pretrained(str(name)))
    except (OSError, ValueError):
        return None


def make_reference(
    model: PreTrainedModel | PeftModel,
    ref_model: str | Path | PreTrainedModel | None,
    peft_config: PeftConfig | None,
    init_kwargs: dict[str, Any] | None,
) -> Reference:
    """The reference of a policy that is about to be trained, and before its adapter is added.

    Raises:
        TokenRatioError: `ref_model` cannot be loaded, or is the policy itself.
    """
    if isinstance(ref_model, str | Path):
        ref_model = load_model(ref_model, init_kwargs)
    if ref_model is not None:
        shared = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) in shared for parameter in ref_model.parameters()):
            raise TokenRatioError(
                "ref_model shares its weights with the policy: leave it out to get the right one"
            )
        vocabularies = [own_head(language_model(m)).weight.shape[0] for m in (model, ref_model)]
        if vocabularies[0] != vocabularies[1]:
            raise TokenRatioError(
                f"the policy has {vocabularies[0]} tokens, ref_model {vocabularies[1]}"
            )
        return Reference.frozen(ref_model, f"ref_model {ref_model.config.name_or_path}")
    if peft_config is None and not isinstance(model, PeftModel):
        return Reference.copy_of(model)
    return Reference.adapter_off(model)


def add_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig) -> PeftModel:
    """Wrap the model in an adapter.

    Raises:
        TokenRatioError: it has one, or the configuration does not fit.
    """
    if isinstance(model, PeftModel):
        raise TokenRatioError(
            "the model already has an adapter: leave out peft_config, or merge it"
        )
    try:
        return get_peft_model(model, peft_config)
    except (ValueError, TypeError) as error:
        raise TokenRatioError(f"peft_config does not fit the model: {_first_line(error)}") from None


def check_adapter(model: PeftModel, *, is_reference: bool) -> None:
    """Refuse virtual tokens, and what would not be off in the reference.

    PEFT switches off the layers it added and the copies of `modules_to_save`. Biases of the base
    (`bias="all"`) and trained token rows stay on.

    Args:
        is_reference: the policy with its adapter off is the reference.
    Raises:
        TokenRatioError: names the first such parameter.
    """
    if model.active_peft_config.is_prompt_learning:
        raise TokenRatioError("prompt learning is not supported: use LoRA, or another added layer")
    if not is_reference:
        return
    prefix = model.base_model.prefix
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and prefix not in name and ".modules_to_save." not in name:
            raise TokenRatioError(
                f"{name} would be trained and stay on when the adapter is off, so that the "
                "reference would move with the policy: use bias='none' and no "
                "trainable_token_indices, or pass ref_model"
            )


def check_fits(model: nn.Module, data: PreparedData) -> None:
    """Refuse rows that the model has no embedding or no position for.

    Raises:
        TokenRatioError: which, and what to do.
    """
    base = language_model(model)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    if data.largest_id >= vocabulary:
        raise TokenRatioError(
            f"the tokenizer gives id {data.largest_id}, the model has {vocabulary} embeddings: "
            "take the model's own tokenizer, or call model.resize_token_embeddings"
        )
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and data.longest > positions:
        raise TokenRatioError(
            f"the longest row has {data.longest} tokens, the model {positions} positions: set "
            f"max_length to {positions}"
        )


def check_model(model: nn.Module) -> None:
    """Refuse a model whose statistics would be wrong or whose head would stay untrained.

    Raises:
        TokenRatioError: see `answer_token_requests`, `check_statistics`, `check_causal`.
    """
    base = language_model(model)
    if len(set(getattr(base, "hf_device_map", {}).values())) > 1:
        raise TokenRatioError(
            "a model split over devices by device_map is not supported: use FSDP, or one device"
        )
    answer_token_requests(base)  # again: an adapter may have changed the head
    weight = base.get_output_embeddings().weight
    sample = torch.arange(min(8, len(weight)), device=weight.device)[None]
    check_statistics(model, sample)
    check_causal(model, sample)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
