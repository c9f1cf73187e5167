"""One row per pair, `[prompt, chosen, rejected, padding]`: the prompt is computed only once.

The two responses are branches of one prompt (docs/method.md §5). Each has the positions of a row of
its own and a mask that hides the other branch, so states and gradients are those of two separate
rows. This holds only for models that apply a whole mask as given and use only a token's position;
`why_not_shared` checks that.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tokenratio.models.token_requests import embedding_weight, language_model
from tokenratio.types import CompletionBatch, StepBatch

# How the architectures tested here take a mask: one for all layers, without a window or with
# `sliding_window`; or a dict with one mask for each of `layer_types`. The last kind also accepts a
# single mask, but then its windowed layers silently see everything.
_ONE_MASK = ("llama", "gpt2", "gpt_neox", "phi")
_ONE_WINDOWED_MASK = ("mistral",)
_MASK_PER_LAYER_TYPE = ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text")
SHAREABLE = (*_ONE_MASK, *_ONE_WINDOWED_MASK, *_MASK_PER_LAYER_TYPE)

# "dynamic" and "longrope" choose new frequencies from the longest sequence of every batch.
_FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def model_inputs(batch: CompletionBatch | StepBatch, model: PreTrainedModel) -> dict[str, Any]:
    """The arguments with which `model`'s forward runs the batch's rows."""
    if isinstance(batch, StepBatch) and batch.branch is not None:
        assert batch.position_ids is not None
        dtype = embedding_weight(model).dtype
        layout = branch_inputs(model.config, batch.branch, batch.position_ids, dtype)
        return {"input_ids": batch.input_ids, **layout}
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def branch_inputs(
    config: PreTrainedConfig,
    branch: Int[Tensor, "rows length"],
    position_ids: Int[Tensor, "rows length"],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The arguments that make a backbone compute both branches of every row.

    Args:
        config: of a model for which `why_not_shared` is None.
        branch: 0 prompt, 1 chosen, 2 rejected, -1 padding, in the order of each row.
        position_ids: continue from the prompt in each branch; any valid value at padding.
        dtype: the model's, that of its attention scores without autocast.
    Returns:
        `position_ids`, and as `attention_mask` what is added to the attention scores,
        `[rows, 1, length, length]`: 0, or the dtype's lowest value where a query (third axis) may
        not see a key (last axis). For some architectures a dict of such masks by layer type.
    """
    length = branch.shape[1]
    index = torch.arange(length, device=branch.device)
    key = branch[:, None, :]
    # Padding sees itself: a query without a key would be nan, and nan × 0 is nan in the gradient.
    visible = (index <= index[:, None]) & ((key == 0) | (key == branch[:, :, None]))

    def mask(window: int | None) -> Float[Tensor, "rows 1 length length"]:
        seen = visible
        if window is not None:
            seen = seen & (position_ids[:, :, None] - position_ids[:, None, :] < window)
        # Float, because eager attention adds the mask. Finite, like transformers' own: every query
        # sees itself, so hidden keys have weight 0, even if a cast makes the value -inf.
        scores = torch.zeros(seen.shape, dtype=dtype, device=branch.device)
        return scores.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]

    # Positions are below `length`: a window at least as long hides nothing and needs no mask.
    windows = {
        layer_type: None if window is None or window >= length else window
        for layer_type, window in _windows(config).items()
    }
    masks = {window: mask(window) for window in set(windows.values())}
    if config.model_type in _MASK_PER_LAYER_TYPE:
        attention_mask: Any = {kind: masks[window] for kind, window in windows.items()}
    else:
        (attention_mask,) = masks.values()
    return {"attention_mask": attention_mask, "position_ids": position_ids}


def _windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """How many positions, including its own, a token sees in each kind of layer."""
    if config.model_type in _ONE_MASK:
        return {"every": None}
    if config.model_type in _ONE_WINDOWED_MASK:
        return {"every": config.sliding_window}
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    return {kind: windows[kind] for kind in sorted(set(config.layer_types))}


def why_not_shared(model: nn.Module) -> str | None:
    """Why a pair's prompt cannot be shared for `model`, as a sentence; None if it can."""
    inner = language_model(model)
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.peft_type != "LORA":
            return f"adapters of type {adapter.peft_type.value} have not been tested with it"
        if adapter.alora_invocation_tokens is not None:
            return "an activated LoRA looks for its invocation tokens in the whole row"
    config = inner.config
    if config.model_type not in SHAREABLE:
        return f"the architecture {config.model_type} has not been tested with it"
    attention = config._attn_implementation
    if attention not in ("eager", "sdpa"):
        return f"{attention} attention cannot mask branches; eager and sdpa can"
    if getattr(config, "use_bidirectional_attention", False) or not getattr(
        config, "is_causal", True
    ):
        return "the model's attention is not causal"
    for rope_type in _rope_types(config):
        if rope_type not in _FIXED_ROPE_TYPES:
            return f"rotary embeddings of type {rope_type} have not been tested with it"
    return None


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """The types of rotary embeddings, which transformers stores flat or by layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return {value["rope_type"] for value in nested or [rope] if value}
