"""Reward models: a language model's body with one output, read at a row's last token."""

import copy
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from tokenratio.errors import TokenRatioError
from tokenratio.models.gguf import is_gguf
from tokenratio.models.loading import load_merged, load_model
from tokenratio.models.pretrained_arguments import DATA_ALONE, loading_arguments
from tokenratio.models.provenance import resolved_name
from tokenratio.models.token_requests import embedding_weight
from tokenratio.models.weights import load_whole, require_whole

_PAD = "<|pad|>"


def load_reward_model(
    name: str | Path, *, seed: int, init_kwargs: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The body of a language model with a new reward head, or a whole reward model.

    In float32 unless `init_kwargs` has another dtype.

    Args:
        name: of a causal language model such as a policy, whose output head is dropped, or of an
            adapter of one; or of a reward model.
        seed: of the new head.
    Raises:
        TokenRatioError: it cannot be loaded, or weights other than the head's are missing.
    """
    arguments = loading_arguments(init_kwargs)
    name = resolved_name(name)
    what = f"{name!r} to start a reward model from"
    policy = load_model(name, init_kwargs) if is_gguf(name) else load_merged(name, init_kwargs)
    if policy is None:
        set_seed(seed)
        return load_whole(
            AutoModelForSequenceClassification,
            name,
            {"num_labels": 1, **arguments},
            what,
            only_body=True,
        )
    model = build_reward_model(policy.config, seed=seed)
    model.to(policy.dtype)  # type: ignore[arg-type]  # transformers wraps `to` without its types
    left = model.load_state_dict(policy.state_dict(), strict=False)
    missing, unexpected = left.missing_keys, left.unexpected_keys
    require_whole(model, missing, unexpected, f"cannot load {what}", only_body=True)
    return model


def build_reward_model(config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """A reward model with random weights."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    set_seed(seed)
    return AutoModelForSequenceClassification.from_config(config, **DATA_ALONE)


def with_padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Make the model read its score at a row's last token, with any padding.

    transformers' classifiers read the last token that is not `config.pad_token_id`. Padded with
    EOS, a row would be read one token before its EOS, so a tokenizer without a pad token of its own
    gets one.

    Returns:
        The tokenizer, or a copy with a pad token; the model then has an embedding for it.
    Raises:
        TokenRatioError: the model is an encoder, which reads its score elsewhere.
    """
    encoders = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
    if encoders or model.config.is_encoder_decoder:
        raise TokenRatioError(
            "an encoder cannot be trained on the policy's rows, prompt and response as one text: "
            "start from a causal language model"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_special_tokens({"pad_token": _PAD})
        if tokenizer.pad_token_id >= len(embedding_weight(model)):
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer
