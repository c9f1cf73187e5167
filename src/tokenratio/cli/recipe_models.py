"""Builds what a recipe names: tokenizer, models and data."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokenratio.cli.recipe import Recipe, Stage
from tokenratio.cli.terminal import user_mistakes
from tokenratio.data import CompletionExample, PreferenceExample, locate
from tokenratio.data.columns import Columns
from tokenratio.data.defects import RowDefectError
from tokenratio.data.formats import DataParser
from tokenratio.data.sources import draw_worlds
from tokenratio.data.template import with_chat_template
from tokenratio.data.vocabulary import train_byte_level_bpe
from tokenratio.data.worlds import is_world_source, world_of
from tokenratio.errors import TokenRatioError
from tokenratio.models.adapters import add_adapter
from tokenratio.models.generation import policy_sampler
from tokenratio.models.loading import load_config, load_model, load_tokenizer
from tokenratio.models.pretrained_arguments import DATA_ALONE
from tokenratio.models.reward_model import build_reward_model, load_reward_model
from tokenratio.names import suggestion
from tokenratio.training.adapter_settings import peft_config_of
from tokenratio.training.memory import AdapterShapes

if TYPE_CHECKING:
    from tokenratio.training.reward_trainer import RewardConfig

_LONGEST_WORLD_RESPONSE = 64


def tokenizer_of(recipe: Recipe, args: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that a recipe names or trains on its data, with the run's chat template."""
    spec = recipe.model if recipe.tokenizer is None else recipe.tokenizer
    assert spec is not None
    if isinstance(spec, dict):
        texts = _texts(recipe.train_dataset, args.split("train"), args.columns)
        tokenizer = train_byte_level_bpe(texts, spec["byte_level_bpe"])
    elif is_world_source(spec):
        tokenizer = world_of(spec).build_tokenizer()
    else:
        tokenizer = load_tokenizer(spec, args.model_init_kwargs)
    return with_chat_template(tokenizer, args.chat_template)


def config_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, args: Any) -> PretrainedConfig:
    """The configuration of the starting policy."""
    if recipe.model_config is not None:
        model_type = str(recipe.model_config["model_type"])
        if model_type not in CONFIG_MAPPING:
            listed = "see the documentation of transformers"
            hint = suggestion(model_type, CONFIG_MAPPING, listed=listed)
            raise TokenRatioError(f"unknown model_type {model_type!r} in model_config{hint}")
    with user_mistakes("cannot build the model's configuration"):
        if recipe.model is not None:
            return load_config(recipe.model, args.model_init_kwargs)
        settings = dict(recipe.model_config or {})
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            settings.setdefault(name, getattr(tokenizer, name))
        settings.setdefault("vocab_size", len(tokenizer))
        return AutoConfig.for_model(settings.pop("model_type"), **settings)


def policy_of(recipe: Recipe, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The starting policy: loaded, or built from its configuration with the stage's seed."""
    if recipe.model is not None:
        return load_model(recipe.model, stage.args.model_init_kwargs)
    config = config_of(recipe, tokenizer, stage.args)
    set_seed(stage.args.seed)
    with user_mistakes("cannot build the model"):
        return AutoModelForCausalLM.from_config(config, **DATA_ALONE)


def sources_of(
    stage: Stage, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, Any]:
    """The stage's training and held-out data; a world's pairs are drawn from the policy."""
    sampler = policy_sampler(
        model,
        tokenizer,
        max_new_tokens=_LONGEST_WORLD_RESPONSE,
        template=stage.args.template,
        seed=stage.args.seed,
    )
    return draw_worlds(stage.train_dataset, sampler), draw_worlds(stage.eval_dataset, sampler)


def reward_model_of(
    recipe: Recipe, args: "RewardConfig", tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The reward model to start from: loaded, or built from its configuration."""
    if recipe.model is not None:
        return load_reward_model(recipe.model, seed=args.seed, init_kwargs=args.model_init_kwargs)
    config = config_of(recipe, tokenizer, args)
    with user_mistakes("cannot build the model"):
        return build_reward_model(config, seed=args.seed)


def adapter_shapes(
    config: PretrainedConfig, settings: PeftConfig | dict[str, Any]
) -> AdapterShapes:
    """The sizes of a new adapter, without allocating the model."""
    new = settings if isinstance(settings, PeftConfig) else peft_config_of(settings)
    with user_mistakes("peft"), torch.device("meta"):
        model = add_adapter(AutoModelForCausalLM.from_config(config, **DATA_ALONE), new)
    return AdapterShapes.of(model, config.get_text_config().num_hidden_layers)


def _texts(source: Any, split: str, columns: Columns | None) -> Iterator[str]:
    """All texts of a data set, for training a tokenizer.

    Rows that cannot be used are skipped; preparing the data counts and reports them.
    """
    groups = [part.rows() for part in locate(source, split=split)]
    parsers = [
        DataParser(groups, wanted, columns) for wanted in (PreferenceExample, CompletionExample)
    ]
    for row in [row for rows in groups for row in rows]:
        for parser in parsers:
            try:
                example = parser.parse(row)
            except RowDefectError:
                continue
            for side in ("prompt", "chosen", "rejected", "completion"):
                text = getattr(example, side, None)
                if isinstance(text, str):
                    yield text
                elif text is not None:
                    yield from (message.get("content", "") for message in text)
            break
