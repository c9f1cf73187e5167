"""From names to models: loading, the adapter, and the reference that goes with it."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokenratio.errors import TokenRatioError
from tokenratio.training.policy import answer_token_requests, check_statistics, language_model
from tokenratio.training.reference import Reference


def load_model(name: str | Path, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """A causal language model by hub name or folder, in float32 unless `init_kwargs` say else.

    Raises:
        TokenRatioError: it cannot be found or loaded.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(name), **{"dtype": "float32", **(init_kwargs or {})}
        )
    except (OSError, ValueError) as error:
        raise TokenRatioError(f"cannot load model {str(name)!r}: {_first_line(error)}") from None


def load_tokenizer(model: str | Path | nn.Module) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model.

    Raises:
        TokenRatioError: there is none.
    """
    name = model if isinstance(model, str | Path) else language_model(model).config.name_or_path
    try:
        return AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise TokenRatioError(
            f"cannot load a tokenizer for {str(name)!r}: {_first_line(error)}"
        ) from None


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
        return Reference.frozen(load_model(ref_model, init_kwargs), f"ref_model {ref_model}")
    if ref_model is not None:
        if ref_model is model:
            raise TokenRatioError(
                "ref_model is the policy itself: leave it out to get a frozen copy"
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
    except ValueError as error:
        raise TokenRatioError(f"peft_config does not fit the model: {_first_line(error)}") from None


def check_model(model: nn.Module) -> None:
    """Refuse a model whose statistics would be wrong or whose head would stay untrained.

    Raises:
        TokenRatioError: see `answer_token_requests` and `check_statistics`.
    """
    base = language_model(model)
    answer_token_requests(base)  # again: an adapter may have changed the head
    weight = base.get_output_embeddings().weight
    check_statistics(model, torch.arange(min(8, len(weight)), device=weight.device)[None])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
