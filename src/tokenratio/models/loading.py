"""Loads models, tokenizers and references, and checks that they fit."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokenratio.data import PreparedData
from tokenratio.errors import TokenRatioError, reported_as
from tokenratio.models.adapter_checks import is_fresh
from tokenratio.models.adapters import load_adapter, merge_adapters
from tokenratio.models.gguf import (
    gguf_ends,
    is_gguf,
    load_gguf,
    load_gguf_config,
    load_gguf_tokenizer,
)
from tokenratio.models.pretrained_arguments import (
    DATA_ALONE,
    WHERE_KWARGS,
    loading,
    loading_arguments,
)
from tokenratio.models.provenance import Origin, chain_of, origin_of, resolved_name, saved_adapter
from tokenratio.models.reference import Reference
from tokenratio.models.token_requests import (
    answer_token_requests,
    check_causal,
    check_statistics,
    embedding_weight,
    language_model,
    own_head,
)
from tokenratio.models.weights import load_whole


def load_model(name: str | Path, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """A causal language model by name, in float32 unless `init_kwargs` differs.

    The name is that of a folder, a GGUF file, a packaged model (`package:smollm2`) or a hub
    repository. An adapter is loaded in its base, active and frozen; adapters below it are merged.

    Raises:
        TokenRatioError: it cannot be found or loaded, or its weights do not fit it.
    """
    arguments = loading_arguments(init_kwargs)
    how = {key: value for key, value in arguments.items() if key not in WHERE_KWARGS}
    base, where, adapters = chain_of(name, arguments)
    of = f", the base of the adapter {name}" if adapters else ""
    model: Any
    if is_gguf(base):
        model = load_gguf(base, how)
    else:
        how = {**how, **where}
        model = load_whole(AutoModelForCausalLM, base, how, f"model {base!r}{of}")
    for adapter in adapters:
        model = load_adapter(model, adapter.name, adapter.where)
    return model


def load_merged(
    name: str | Path, init_kwargs: dict[str, Any] | None = None
) -> PreTrainedModel | None:
    """The plain model that an adapter and its base make; None if `name` is not an adapter."""
    adapters = chain_of(name, init_kwargs)[2]
    if not adapters:
        return None
    with reported_as(f"cannot read the adapter {name}", ValueError, TypeError, OSError, KeyError):
        kind = PeftConfig.from_pretrained(adapters[-1].name, **adapters[-1].where).task_type
    if kind not in (None, "CAUSAL_LM"):
        raise TokenRatioError(
            f"{name} is an adapter of another kind of model ({kind}), not of a policy: name the "
            "policy that it was trained on"
        )
    return merge_adapters(load_model(name, init_kwargs))


def load_config(name: str | Path, init_kwargs: dict[str, Any] | None = None) -> PretrainedConfig:
    """The configuration of a model by name; of an adapter, its base's.

    It is read from the revision that `init_kwargs` name.
    """
    base, where, _ = chain_of(name, init_kwargs)
    if is_gguf(base):
        return load_gguf_config(base)
    with loading(f"the configuration of {base!r}"):
        return AutoConfig.from_pretrained(base, **where, **DATA_ALONE)


def load_tokenizer(
    model: str | Path | nn.Module, init_kwargs: dict[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model, from the revision that the model's `init_kwargs` name.

    An adapter saved without one uses its base's.
    """
    if isinstance(model, str | Path):
        name = resolved_name(model)
    else:
        name = origin_of(model).name or str(language_model(model).config.name_or_path or "")
    if is_gguf(name):
        return load_gguf_tokenizer(name)
    where = {k: v for k, v in (init_kwargs or {}).items() if k in WHERE_KWARGS}
    try:
        with loading(f"a tokenizer for {name!r}"):
            return AutoTokenizer.from_pretrained(name, **where, **DATA_ALONE)
    except TokenRatioError as error:
        refusal = error
    adapter = saved_adapter(name, where) if name else None
    if adapter is not None:
        return load_tokenizer(adapter.base, dict(adapter.base_where))
    raise refusal


def require_same_vocabulary(name: str | Path, other: str | Path) -> None:
    """Refuse two models whose tokens are not the same; sizes alone may be equal by chance."""
    if load_tokenizer(name).get_vocab() != load_tokenizer(other).get_vocab():
        raise TokenRatioError(
            f"{name} and {other} have different tokenizers, so their log-probabilities cannot be "
            "compared: choose models with the same tokenizer"
        )


def generation_ends(config: Any) -> list[int] | None:
    """The ids at which generation stops by a generation_config; None if it names none."""
    ends = getattr(config, "eos_token_id", None)
    return ends if ends is None or isinstance(ends, list) else [ends]


def load_generation_ends(name: str | Path) -> list[int] | None:
    """`generation_ends` of a model by name; None without a generation_config."""
    try:
        base, where, _ = chain_of(name)
        if is_gguf(base):
            return gguf_ends(base)
        return generation_ends(GenerationConfig.from_pretrained(base, **where))
    except (OSError, ValueError):
        return None


def make_reference(
    model: PreTrainedModel | PeftModel,
    ref_model: str | Path | PreTrainedModel | PeftModel | None,
    *,
    adds_adapter: bool,
    init_kwargs: dict[str, Any] | None,
) -> Reference:
    """The reference of a policy, before training and before a new adapter is added.

    Args:
        adds_adapter: a new adapter will be added to `model`.
    Raises:
        TokenRatioError: `ref_model` cannot be loaded, or is the policy itself.
    """
    if isinstance(ref_model, str | Path):
        ref_model = load_model(ref_model, init_kwargs)
    if ref_model is not None:
        ref_model = language_model(ref_model)
        shared = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) in shared for parameter in ref_model.parameters()):
            raise TokenRatioError(
                "ref_model shares its weights with the policy: leave it out to use the "
                "starting policy"
            )
        vocabularies = [own_head(m).weight.shape[0] for m in (model, ref_model)]
        if vocabularies[0] != vocabularies[1]:
            raise TokenRatioError(
                f"the policy has {vocabularies[0]} tokens, ref_model {vocabularies[1]}"
            )
        return Reference.frozen(ref_model, "ref_model", origin_of(ref_model))
    origin = origin_of(model)
    if isinstance(model, PeftModel) and is_fresh(model):
        return Reference.adapter_off(Origin(origin.base, origin.base))
    return Reference.adapter_off(origin) if adds_adapter else Reference.copy_of(model, origin)


def check_fits(model: nn.Module, data: PreparedData) -> None:
    """Raise `TokenRatioError` for rows that the model has no embedding or no position for."""
    base = language_model(model)
    vocabulary = len(embedding_weight(base))
    if data.largest_id >= vocabulary:
        raise TokenRatioError(
            f"the data has token id {data.largest_id}, but the model has only {vocabulary} "
            "embeddings: use the model's own tokenizer, or call model.resize_token_embeddings"
        )
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and data.longest > positions:
        raise TokenRatioError(
            f"the longest row has {data.longest} tokens, the model {positions} positions: set "
            f"max_length to {positions}"
        )


def check_model(model: nn.Module) -> None:
    """Refuse a model with wrong statistics or an untrained head."""
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
