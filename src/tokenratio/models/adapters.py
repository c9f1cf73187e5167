"""Adds, removes, merges and copies adapters."""

import copy
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from tokenratio.errors import TokenRatioError, reported_as
from tokenratio.models.adapter_checks import require_same, sample_log_probs
from tokenratio.models.pretrained_arguments import loading
from tokenratio.models.provenance import Origin, origin_of, set_origin
from tokenratio.models.token_requests import language_model
from tokenratio.models.weights import describe

_log = logging.getLogger(__name__)

# The share of an update that merging may round away before it is logged.
_ROUNDED_AWAY = 0.01


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has an adapter, in PEFT's wrapper or added by transformers."""
    return isinstance(model, PeftModel) or any(map(_is_added, model.modules()))


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """Wrap a model without adapters in a new one."""
    if has_adapter(model):
        raise TokenRatioError("the model already has an adapter: merge it first")
    config = copy.deepcopy(peft_config)
    config.base_model_name_or_path = None  # or PEFT warns of a configuration used twice
    with reported_as("peft_config does not fit the model", ValueError, TypeError, RuntimeError):
        adapted = get_peft_model(model, config)
    config.base_model_name_or_path = origin_of(model).name or None
    return adapted


def load_adapter(model: PreTrainedModel, name: str, where: Mapping[str, Any]) -> PreTrainedModel:
    """The model with a saved adapter, active and frozen; an adapter it already has is merged.

    Args:
        name: the adapter's folder or hub name.
        where: arguments of from_pretrained about where to find its files.
    Raises:
        TokenRatioError: it cannot be loaded, or was made for another model.
    """
    below = origin_of(model)
    if has_adapter(model):
        model = merge_adapters(model)
    with loading(f"the adapter {name} onto {below}"):
        config = PeftConfig.from_pretrained(name, **where)
        if config.is_prompt_learning:
            raise TokenRatioError(
                f"{name} holds virtual tokens ({config.peft_type.value}): prompt learning is not "
                "supported"
            )
        config.base_model_name_or_path, config.inference_mode = None, True
        _fit_vocabulary(model, name, where)
        adapted = get_peft_model(model, config)
        found = adapted.load_adapter(name, "default", **where)
    # PEFT saves an embedding of another size twice, and reads it under its plain name.
    twice = (".modules_to_save.", ".original_module.")
    unread = [key for key in found.unexpected_keys if not any(part in key for part in twice)]
    if wrong := [*found.missing_keys, *unread]:
        raise TokenRatioError(
            f"the adapter {name} does not belong to {below}: {len(wrong)} weights have no "
            f"counterpart, such as {wrong[0]}"
        )
    inner = language_model(adapted)
    inner._hf_peft_config_loaded = True  # as transformers marks a model with an adapter in it
    set_origin(inner, Origin(name, below.base, (*below.adapters, name)))
    return inner


def check_adapter_file(model: PeftModel, folder: Path) -> None:
    """Refuse a checkpoint of the adapter that lacks weights or has others; it was just loaded."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        found = set(file.keys())
    missing, over = (
        get_peft_model_state_dict(model, save_embedding_layers=False).keys() - found,
        found - get_peft_model_state_dict(model, save_embedding_layers=True).keys(),
    )
    if missing or over:
        raise TokenRatioError(f"{path} is not of this run's adapter: {describe(missing, over)}")


def _fit_vocabulary(model: PreTrainedModel, name: str, where: Mapping[str, Any]) -> None:
    """Resize the base for an adapter that was trained with more or fewer tokens.

    One that holds only the embeddings or only the output head is refused.
    """
    sides = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    num_tokens = len(sides["embeddings"].weight)
    paths = {path: side for side in sides for path, m in model.named_modules() if m is sides[side]}
    held: dict[str, int] = {}
    for key, tensor in load_peft_weights(name, device="cpu", **where).items():
        path = key.removesuffix(".weight").removeprefix("base_model.model.")
        if path in paths and key.endswith(".weight"):
            held[paths[path]] = len(tensor)
    sizes = {*held.values()} - {num_tokens}
    if not sizes:
        return
    is_tied = sides["embeddings"].weight is sides["head"].weight
    rows = " and ".join(f"{num} rows of the {side}" for side, num in held.items())
    if (len(held) == 1 and not is_tied) or len({*held.values()}) > 1:
        raise TokenRatioError(
            f"the adapter {name} holds {rows}, but {origin_of(model)} has {num_tokens} tokens: "
            "resize the model as it was for the adapter's training, load the adapter onto it with "
            "peft, and pass that object"
        )
    _log.warning(
        "%s has %d tokens, the adapter %s has %d: resizing the model",
        *(origin_of(model), num_tokens, name, *sizes),
    )
    model.resize_token_embeddings(sizes.pop(), mean_resizing=False)


def as_peft_model(model: PreTrainedModel | PeftModel) -> PeftModel:
    """The model with its one active adapter in PEFT's wrapper, ready to be trained further."""
    inner, origin, (name, *more) = language_model(model), origin_of(model), _active_adapters(model)
    if more:
        raise TokenRatioError(
            f"the model has several active adapters ({', '.join([name, *more])}): activate one "
            "with set_adapter, or merge them first"
        )
    if isinstance(model, PeftModel) and list(model.peft_config) == ["default"]:
        adapted = model
    else:
        config = copy.deepcopy(inner.peft_config[name])
        problem = f"{origin}: its adapter cannot be trained further"
        with reported_as(problem, ValueError, TypeError, RuntimeError):
            state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            if not isinstance(model, PeftModel):
                state = {f"base_model.model.{key}": value for key, value in state.items()}
            config.base_model_name_or_path, config.inference_mode = None, False
            adapted = get_peft_model(_without_adapters(inner), cast(PeftConfig, config))
            set_peft_model_state_dict(adapted, state)
        set_origin(language_model(adapted), origin)
    config = adapted.active_peft_config
    config.base_model_name_or_path = origin.base or config.base_model_name_or_path
    config.inference_mode = False
    if not any(p.requires_grad for p in adapted.parameters()):
        adapted.set_adapter("default")
    return adapted


def merge_adapters(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The plain model that a base and its active adapters make together; the base is changed.

    Sums are computed in at least float32 and rounded once to the model's precision. If much of a
    small update is lost, this is logged.

    Raises:
        TokenRatioError: the base is quantised, or the merged model computes something else.
    """
    merged, origin = language_model(model), origin_of(model)
    if getattr(merged, "hf_quantizer", None) is not None:
        raise TokenRatioError(
            f"{origin}: an adapter cannot be merged into a quantised model without loss. Load the "
            "model unquantised, or train the adapter further (leave out peft)"
        )
    _active_adapters(model)
    before = sample_log_probs(model)
    _untie_if_adapted(merged)
    lost, total = 0.0, 0.0
    for layer in [m for m in merged.modules() if isinstance(m, BaseTunerLayer)]:
        if layer.active_adapters:
            with reported_as(f"{origin} cannot be merged", ValueError, RuntimeError):
                layer_lost, layer_total = _merge_layer(layer)
            lost, total = lost + layer_lost, total + layer_total
    merged = _without_adapters(merged, merged=True)
    merged.requires_grad_(True)
    share = (lost / total) ** 0.5 if total else 0.0
    if share > _ROUNDED_AWAY:
        _log.warning(
            "merging %s: rounding to %s loses %.0f%% of what the adapter changes; load the model "
            "in float32 to keep all of it",
            origin,
            str(merged.dtype).removeprefix("torch."),
            100 * share,
        )
    require_same(
        before, sample_log_probs(merged), f"{origin} cannot be merged", precision=merged.dtype
    )
    set_origin(merged, origin)
    return merged


def _merge_layer(layer: Any) -> tuple[float, float]:
    """Merge one layer; return the squared norms of what rounding lost and of the whole update."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "already merged"
        if weight is None or weight.dtype not in (torch.bfloat16, torch.float16):
            layer.merge(safe_merge=True)
            return 0.0, 0.0
        dtype, before = weight.dtype, weight.detach().float()
        layer.float()
        layer.merge(safe_merge=True)
    after = layer.get_base_layer().weight.detach()
    update, lost = after - before, after - after.to(dtype).float()
    layer.to(dtype)
    return float(lost.square().sum()), float(update.square().sum())


def _untie_if_adapted(model: PreTrainedModel) -> None:
    """Untie the output head if an adapter changes only the head or only the embeddings."""
    sides: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    layers = [side.get_base_layer() if isinstance(side, BaseTunerLayer) else side for side in sides]
    weights = [getattr(layer, "weight", None) for layer in layers]
    if weights[0] is weights[1] and weights[0] is not None and layers != sides:
        layers[1].weight = nn.Parameter(weights[0].detach().clone(), requires_grad=False)


def shared_copy(model: PeftModel) -> PreTrainedModel:
    """A copy of the model inside: adapters are copied, frozen weights of the base shared."""
    inner = language_model(model)
    return copy.deepcopy(inner, {id(p): p for p in inner.parameters() if not p.requires_grad})


def base_of(model: PeftModel) -> PreTrainedModel:
    """The model without its adapter, as a model of its own; all weights are shared."""
    inner = language_model(model)
    tensors = [*inner.parameters(), *inner.buffers()]
    plain = _without_adapters(copy.deepcopy(inner, {id(tensor): tensor for tensor in tensors}))
    plain.__dict__.pop("forward", None)  # which answers token requests
    return plain


def _without_adapters(model: PreTrainedModel, *, merged: bool = False) -> PreTrainedModel:
    """Replace PEFT's layers by the original or merged ones."""
    added = {name: module for name, module in model.named_modules() if _is_added(module)}
    for name, module in added.items():
        if any(name.startswith(f"{other}.") for other in added):
            continue
        if isinstance(module, BaseTunerLayer):
            if module.merged and not merged:
                module.unmerge()
            plain = module.get_base_layer()
        elif merged:
            plain = module.unload_and_optionally_merge_module(True, False, None)
        else:
            plain = module.original_module
        model.set_submodule(name, plain)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False
    # transformers' names of an adapter's weights would go into what is saved.
    names = [
        str(each.source_patterns) for each in getattr(model, "_weight_conversions", None) or ()
    ]
    if any("base_model.model" in name for name in names):
        del model._weight_conversions
    if merged:
        _note_untied(model)
    return model


def _note_untied(model: PreTrainedModel) -> None:
    """Record in the configuration that a head which was trained whole is no longer tied."""
    sides = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [getattr(side, "weight", None) for side in sides]
    if weights[0] is not weights[1]:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _active_adapters(model: PreTrainedModel | PeftModel) -> list[str]:
    """The names of the active adapters; others are logged."""
    inner = language_model(model)
    layers: list[Any] = [module for module in inner.modules() if _is_added(module)]
    active = sorted({name for layer in layers for name in layer.active_adapters})
    if not active or any(layer.disable_adapters for layer in layers):
        raise TokenRatioError("the model has an adapter that is switched off: enable or unload it")
    if others := sorted(set(inner.peft_config) - set(active)):
        _log.warning("inactive adapters are ignored: %s", ", ".join(others))
    return active


def _is_added(module: Any) -> bool:
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
